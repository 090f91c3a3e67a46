// Stage 1, step: the kernels and their launch; the work is in step_body.h.

#include "cuda/launch.h"
#include "cuda/step_body.h"

namespace epi::cuda {
namespace {

// Blocks a multiprocessor is to hold at least: as many as ptxas fits without spilling on sm_75 to
// sm_120 (nvcc 13.0); left to itself it spills some of these kernels. What is in flight then, 48 KiB
// and more a multiprocessor, is above latency times bandwidth of an H200 on paper; not measured.
template <class P, class S, class U>
constexpr int kStepBlocks = kOwn<U> || sizeof(P) != sizeof(S) ? 2 : 3;
constexpr int kStepStatsBlocks = 2;

template <class P, class S, class U>
__global__ void __launch_bounds__(kThreads, kStepBlocks<P, S, U>) step_kernel(const StepArgs args) {
  step_program<P, S, U>(args, DeviceBlock{});
}

template <class P, class S, class U>
__global__ void __launch_bounds__(kThreads, kStepStatsBlocks) step_stats_kernel(const StepArgs args) {
  __shared__ StatsPartial shared[kThreads];
  step_stats_program<P, S, U>(args, DeviceBlock{}, shared);
}

template <class P, class S, class U>
void launch(const StepArgs& args, bool stats, cudaStream_t stream) {
  const auto programs = static_cast<unsigned>(args.work.n_programs);
  if (stats) {
    step_stats_kernel<P, S, U><<<programs, kThreads, 0, stream>>>(args);
  } else {
    step_kernel<P, S, U><<<programs, kThreads, 0, stream>>>(args);
  }
}

template <class P, class S>
void launch(const StepArgs& args, const StepKind& kind, cudaStream_t stream) {
  switch (kind.importance) {
    case Importance::kShared:
      return launch<P, S, SharedImportance>(args, kind.stats, stream);
    case Importance::kFloat32:
      return launch<P, S, float>(args, kind.stats, stream);
    case Importance::kBfloat16:
      return launch<P, S, uint16_t>(args, kind.stats, stream);
  }
}

}  // namespace

int launch_step(const StepArgs& args, const StepKind& kind, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (kind.param_bf16) {
    kind.state_bf16 ? launch<uint16_t, uint16_t>(args, kind, stream)
                    : launch<uint16_t, float>(args, kind, stream);
  } else {
    kind.state_bf16 ? launch<float, uint16_t>(args, kind, stream) : launch<float, float>(args, kind, stream);
  }
  return cudaGetLastError();
}

}  // namespace epi::cuda
