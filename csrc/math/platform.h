// What every file of csrc/math needs: one spelling of "inline" and a namespace an instruction set.
//
// The CPU library compiles these headers once for each instruction set. Every copy lives in its own
// namespace (EPI_ISA) and is inlined by force, so that the linker can never serve a function
// compiled for AVX-512 to a processor without it. CUDA sources leave EPI_ISA alone and call the
// templates with float.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define EPI_INLINE __host__ __device__ __forceinline__
#else
#define EPI_INLINE inline __attribute__((always_inline))
#endif

#ifndef EPI_ISA
#define EPI_ISA scalar
#endif

#if defined(__FAST_MATH__)
#error "epi-kernels needs one IEEE rounding an operation: build without -ffast-math"
#endif
