// Before stage 1: the kernel and its launch; the work is in prepare_body.h.

#include "cuda/launch.h"
#include "cuda/prepare_body.h"

namespace epi::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) prepare_kernel(const PrepareArgs args) {
  prepare_program(args, DeviceBlock{});
}

}  // namespace

int launch_prepare(const PrepareArgs& args, void* stream) {
  const auto blocks = static_cast<unsigned>((args.n_rows + kThreads - 1) / kThreads);
  prepare_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace epi::cuda
