// The step of parameters of whose states some are 8-bit codes.

#include "cuda/step_kernels.h"

namespace epi::cuda {

int launch_step_codes(const StepArgs& args, const StepKind& kind, void* stream) {
  return launch_step_of<StepSource::kCodes>(args, kind, stream);
}

}  // namespace epi::cuda
