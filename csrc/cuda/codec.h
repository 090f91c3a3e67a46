// 8-bit states: one element's code beside its block's scale (epi_kernels/reference/codec.py), on the road
// that is short on a GPU: float32's own subnormals lay codes on their grid. csrc/math/codec.h is the one for
// CPUs, where subnormals are slow.

#pragma once

#include "math/scalar.h"

namespace epi::EPI_ISA {

constexpr int kCodeBlock = 64;  // consecutive logical elements that share a scale
constexpr uint32_t kNonfiniteScale = 255;

// How a block is encoded. kSigned: exp_avg; else exp_avg_sq and importance.
template <bool kSigned>
struct CodeScale {
  uint32_t exponent;  // biased, of the largest magnitude, rounded up in the last 1/16 of a binade
  bool finite;

  // `top`: the largest of the block's magnitude_word()s.
  explicit EPI_INLINE CodeScale(uint32_t top) {
    constexpr uint32_t kRoundUp = 0x7FFFFu, kLimit = kSigned ? 247u : 255u, kLowest = 24u;
    finite = top < (kLimit << 23) - kRoundUp;
    exponent = (top + kRoundUp) >> 23;
    exponent = exponent < kLowest ? kLowest : exponent;
    if (!finite) exponent = 256u;
  }
  EPI_INLINE uint32_t stored() const { return finite ? exponent - 24u : kNonfiniteScale; }
};

// Ordered as the magnitudes are, NaN > inf > finite. What is not signed is never negative; a NaN that
// arithmetic made may have its sign set, and is the largest all the same.
template <bool kSigned>
EPI_INLINE uint32_t magnitude_word(float x) {
  return kSigned ? bits_of(x) & 0x7FFFFFFFu : bits_of(x);
}

// floor(x + random_bits / 65536) on the code's scale. In its word, a code lies above 19 bits of fraction.
template <bool kSigned>
EPI_INLINE uint32_t encode(float x, uint32_t random_bits, const CodeScale<kSigned>& scale) {
  if constexpr (kSigned) {
    // The smallest normal code becomes float32's smallest normal number, so that the multiplication lays
    // subnormals on their grid. No one float is the whole factor for every exponent.
    const float scaled = x * float_of((260u - scale.exponent) << 23) * 0x1p-126f;
    const uint32_t word = bits_of(scaled) + (random_bits << 3);
    const uint32_t code = (((word << 5) & 0x7FFFFFFFu) | (word & 0x80000000u)) >> 24;
    return scale.finite ? code : 0u;
  } else {
    const uint32_t least = scale.finite ? 16u : 255u;  // that a positive value may have
    const uint32_t base = (scale.exponent - 15u) << 23;
    const auto word = static_cast<int32_t>(bits_of(x) + (random_bits << 3) - base);
    const auto floor = static_cast<int32_t>(least << 19);
    const uint32_t code = static_cast<uint32_t>(word > floor ? word : floor) >> 19;
    return bits_of(x) != 0u ? code : (scale.finite ? 0u : 255u);
  }
}

// What a block's codes are multiplied by; not finite where the block is not.
template <bool kSigned>
EPI_INLINE float code_factor(uint32_t scale) {
  if constexpr (kSigned) {
    return float_of(scale == kNonfiniteScale ? 0x7FC00000u : (scale + 32u) << 23);
  } else {
    const uint32_t exponent = scale + 24u;
    return float_of((exponent < 255u ? exponent : 255u) << 23);
  }
}

// Exact. The code as a float32's word is a small number, mostly subnormal; two factors make it the value.
template <bool kSigned>
EPI_INLINE float decode(uint32_t code, float factor) {
  uint32_t word = code << 19;
  if constexpr (kSigned) word = ((code & 0x7Fu) << 19) | ((code & 0x80u) << 24);
  return float_of(word) * 0x1p112f * factor;
}

}  // namespace epi::EPI_ISA
