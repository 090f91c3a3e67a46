// The vocabulary of csrc/math, for one element. csrc/cpu/vec_*.h has the same words for 16 at once.
//
// F: float32 values, U: their words as uint32, M: one truth value each.

#pragma once

#include <cstring>

#if !defined(__CUDACC__)
#include <cmath>
#endif

#include "math/platform.h"

namespace epi::EPI_ISA {

template <class F>
struct Lanes;  // U, M, broadcasts

template <>
struct Lanes<float> {
  using U = uint32_t;
  using M = bool;
  static EPI_INLINE float f32(float x) { return x; }
  static EPI_INLINE uint32_t u32(uint32_t x) { return x; }
};

EPI_INLINE uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t word;
  memcpy(&word, &x, sizeof word);
  return word;
#endif
}

EPI_INLINE float float_of(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(word);
#else
  float x;
  memcpy(&x, &word, sizeof x);
  return x;
#endif
}

// Correctly rounded, as IEEE 754 asks; never an approximation plus Newton steps.
EPI_INLINE float sqrt_rn(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return sqrtf(x);
#endif
}

EPI_INLINE float select(bool where, float a, float b) {
  return where ? a : b;
}
EPI_INLINE uint32_t select(bool where, uint32_t a, uint32_t b) {
  return where ? a : b;
}
EPI_INLINE bool any(bool where) {
  return where;
}

EPI_INLINE float min(float x, float y) {
  return x < y ? x : y;
}
// Words as signed integers.
EPI_INLINE uint32_t max_signed(uint32_t x, uint32_t y) {
  return static_cast<int32_t>(x) > static_cast<int32_t>(y) ? x : y;
}
// `x` where `sign` is a positive integer, 0 where it is 0; it is never negative.
EPI_INLINE uint32_t where_positive(uint32_t x, uint32_t sign) {
  return sign != 0 ? x : 0u;
}
// x * y + z where the product is exact, or too small to be seen in the sum: one rounding or two.
EPI_INLINE float add_exact_product(float x, float y, float z) {
  return x * y + z;
}

template <class F>
EPI_INLINE typename Lanes<F>::M is_finite(F x) {
  const auto exponent = Lanes<F>::u32(0x7F800000u);
  return (bits_of(x) & exponent) != exponent;
}

}  // namespace epi::EPI_ISA
