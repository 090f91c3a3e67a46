// Stage 2, stats: the kernels and their launches; the work is in stats_body.h.

#include "cuda/launch.h"
#include "cuda/stats_body.h"

namespace epi::cuda {
namespace {

__global__ void __launch_bounds__(kThreads, 4) stats_kernel(const StatsArgs args) {
  __shared__ StatsPartial shared[kThreads];
  stats_program(args, DeviceBlock{}, shared);
}

__global__ void __launch_bounds__(kThreads) merge_kernel(const MergeArgs args) {
  __shared__ StatsPartial shared[kThreads];
  merge_run(args, DeviceBlock{}, shared);
}

}  // namespace

int launch_stats(const StatsArgs& args, void* stream) {
  const auto programs = static_cast<unsigned>(args.work.n_programs);
  stats_kernel<<<programs, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

int launch_merge(const MergeArgs& args, void* stream) {
  const auto runs = static_cast<unsigned>(args.n_runs);
  merge_kernel<<<runs, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace epi::cuda
