// A block of threads, on the device or played by the host. Kernel bodies are templates over it, so
// that python_tests can run the very same code without a GPU, one system thread a CUDA thread.

#pragma once

#include "math/platform.h"

#if defined(__CUDACC__)
#define EPI_KERNEL __device__ __forceinline__
#else
#define EPI_KERNEL inline
#endif

namespace epi::cuda {

constexpr int kGroup = 4;  // neighbouring threads that share the scale of 64 codes

#if defined(__CUDACC__)

struct DeviceBlock {
  EPI_KERNEL int thread() const { return static_cast<int>(threadIdx.x); }
  EPI_KERNEL int threads() const { return static_cast<int>(blockDim.x); }
  EPI_KERNEL int64_t index() const { return blockIdx.x; }
  EPI_KERNEL void sync() const { __syncthreads(); }
  // The largest of a group's values. Whole warps call it.
  EPI_KERNEL uint32_t group_max(uint32_t value) const {
#pragma unroll
    for (int other = 1; other < kGroup; other *= 2) {
      value = max(value, __shfl_xor_sync(0xFFFFFFFFu, value, other));
    }
    return value;
  }
  EPI_KERNEL void add(uint32_t* shared, uint32_t value) const { atomicAdd(shared, value); }
  EPI_KERNEL void add(int64_t* global, int64_t value) const {
    atomicAdd(reinterpret_cast<unsigned long long*>(global), static_cast<unsigned long long>(value));
  }
};

#endif

}  // namespace epi::cuda
