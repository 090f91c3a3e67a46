// The step of bfloat16 weights with corrections beside them.

#include "cuda/step_kernels.h"

namespace epi::cuda {

int launch_step_corrected(const StepArgs& args, const StepKind& kind, void* stream) {
  return launch_step_of<StepSource::kCorrected>(args, kind, stream);
}

}  // namespace epi::cuda
