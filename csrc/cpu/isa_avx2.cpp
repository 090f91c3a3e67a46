// The stages compiled for AVX2. Only reached on processors that have it (dispatch.cpp).

#if defined(__x86_64__)

// Before the switch of target: what the standard library defines must stay runnable everywhere.
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt")
#endif
#include <immintrin.h>

#define EPI_ISA avx2
#include "cpu/codes_avx2.h"
#include "cpu/isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace epi {
constinit const Kernels kAvx2Kernels = avx2::stages("avx2");
}

#endif
