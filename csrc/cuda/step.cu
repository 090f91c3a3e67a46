// The step of parameters whose states are float32 or bfloat16.

#include "cuda/step_kernels.h"

namespace epi::cuda {

int launch_step(const StepArgs& args, const StepKind& kind, void* stream) {
  return launch_step_of<StepSource::kFloats>(args, kind, stream);
}

}  // namespace epi::cuda
