// Stage 3, threshold: the kernels and their launches; the work is in threshold_body.h.

#include "cuda/launch.h"
#include "cuda/threshold_body.h"

namespace epi::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) count_bounds_kernel(const CountArgs args) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < 4 * args.n_layers) count_bound(args, index);
}

__global__ void __launch_bounds__(kThreads, 3) count_kernel(const CountArgs args) {
  __shared__ CountShared shared;
  count_program(args, DeviceBlock{}, &shared);
}

}  // namespace

int launch_count(const CountArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto blocks = static_cast<unsigned>((4 * args.n_layers + kThreads - 1) / kThreads);
  count_bounds_kernel<<<blocks, kThreads, 0, cuda_stream>>>(args);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  count_kernel<<<static_cast<unsigned>(args.work.n_programs), kThreads, 0, cuda_stream>>>(args);
  return cudaGetLastError();
}

}  // namespace epi::cuda
