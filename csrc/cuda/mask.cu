// Stage 4, mask: the kernels and their launches; the work is in mask_body.h.

#include "cuda/launch.h"
#include "cuda/mask_body.h"

namespace epi::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) select_bounds_kernel(const SelectArgs args) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < 2 * args.n_layers) select_bound(args, index);
}

__global__ void __launch_bounds__(kThreads, 4) select_kernel(const SelectArgs args) {
  __shared__ SelectShared shared;
  select_program(args, DeviceBlock{}, &shared);
}

}  // namespace

int launch_select(const SelectArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto blocks = static_cast<unsigned>((2 * args.n_layers + kThreads - 1) / kThreads);
  select_bounds_kernel<<<blocks, kThreads, 0, cuda_stream>>>(args);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  select_kernel<<<static_cast<unsigned>(args.work.n_programs), kThreads, 0, cuda_stream>>>(args);
  return cudaGetLastError();
}

}  // namespace epi::cuda
