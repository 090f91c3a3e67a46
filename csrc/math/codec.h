// 8-bit states: bytes under a power-of-two scale a block of 64 consecutive logical elements
// (epi_kernels/reference/codec.py).
//
// A block's scale byte is the biased exponent of its largest magnitude, less kLowestExponent; exponents
// are biased float32 exponents throughout. Lanes need U max(U, U) beside the vocabulary of scalar.h.

#pragma once

#include "math/rounding.h"

namespace epi::EPI_ISA {

constexpr int kCodeBlock = 64;
constexpr uint32_t kLowestExponent = 24;
constexpr uint32_t kNonfiniteScale = 255;
// Exponents from which a block is not finite: exp_avg; exp_avg_sq and importance.
constexpr uint32_t kSignedLimit = 247, kPositiveLimit = 255;
constexpr uint32_t kNearest = 0x8000u;  // "random bits" that round to nearest

constexpr uint32_t kMagnitude = 0x7FFFFFFFu;
constexpr uint32_t kOne = 0x3F800000u;     // 1.0f
constexpr uint32_t kBinade = 0x00800000u;  // a float's word grows by it when the value doubles
constexpr int kCodeShift = 19;             // of a float's word: four bits of mantissa stay

// `top`: the largest magnitude of a block, as a word. From 31/32 of a binade on the next one's exponent
// is taken, so that rounding up never overflows a code.
EPI_INLINE uint32_t block_exponent(uint32_t top) {
  const uint32_t exponent = (top + 0x7FFFFu) >> 23;
  return exponent < kLowestExponent ? kLowestExponent : exponent;
}

EPI_INLINE float power_of_two(uint32_t exponent) {
  return float_of(exponent << 23);
}

// What half_value() is multiplied by; an infinity and a NaN make the whole block so.
EPI_INLINE float positive_factor(uint32_t scale) {
  return scale == kNonfiniteScale ? float_of(0x7F800000u) : power_of_two(scale + kLowestExponent);
}
EPI_INLINE float signed_factor(uint32_t scale) {
  return scale == kNonfiniteScale ? float_of(0x7FC00000u) : power_of_two(scale + kLowestExponent + 8);
}

// The number whose binary16 word is `code` << 6, of seven bits or eight: what F16C and GPUs convert.
template <class F>
EPI_INLINE F half_value(typename Lanes<F>::U code) {
  using L = Lanes<F>;
  const auto word = code << kCodeShift;
  const F normal = float_of(word + L::u32(kOne)),
          subnormal = float_of(word + L::u32(0x40000000u)) - L::f32(2.0f);
  return select(normal < subnormal, normal, subnormal) * L::f32(power_of_two(127 - 15));
}

// `base` = (exponent - 15) << 23. A positive value never becomes 0: codes start at 16.
template <class F>
EPI_INLINE typename Lanes<F>::U encode_positive(F x, typename Lanes<F>::U random_bits,
                                                typename Lanes<F>::U base) {
  using L = Lanes<F>;
  const auto word = bits_of(x);
  const auto rounded = max(word + (random_bits << 3), base + L::u32(16u << kCodeShift));
  return select(word == L::u32(0), L::u32(0), (rounded - base) >> kCodeShift);
}

// `factor` = signed_shift(exponent) makes 2.0 of the smallest normal. Adding 2 lays what is below it on the
// grid of the subnormals.
template <class F>
EPI_INLINE typename Lanes<F>::U encode_signed(F x, typename Lanes<F>::U random_bits, F factor) {
  using L = Lanes<F>;
  const auto word = bits_of(x);
  const F y = float_of(word & L::u32(kMagnitude)) * factor;
  const auto scaled = max(bits_of(y), bits_of(y + L::f32(2.0f)) - L::u32(kBinade));
  const auto code = (scaled + (random_bits << 3) - L::u32(kOne)) >> kCodeShift;
  return code + ((word >> 24) & L::u32(0x80u));
}

EPI_INLINE uint32_t positive_base(uint32_t exponent) {
  return (exponent - 15) << 23;
}
EPI_INLINE float signed_shift(uint32_t exponent) {
  return power_of_two(261 - exponent);
}

}  // namespace epi::EPI_ISA
