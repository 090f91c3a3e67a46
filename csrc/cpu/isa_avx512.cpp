// The stages compiled for AVX-512. Only reached on processors that have it (dispatch.cpp).

#if defined(__x86_64__)

// Before the switch of target: what the standard library defines must stay runnable everywhere.
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,popcnt"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,popcnt")
#endif
#if !defined(__clang__)
// gcc 12 takes the undefined inputs inside its own intrinsics for a mistake
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#define EPI_ISA avx512
#include "cpu/codes_avx512.h"
#include "cpu/isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace epi {
constinit const Kernels kAvx512Kernels = avx512::stages("avx512");
}

#endif
