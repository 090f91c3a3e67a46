// 8-bit states (math/codec.h) on the road that is short on a GPU: float32's own subnormals, slow on a CPU
// and free here, lay codes on their grid. The same bits.

#pragma once

#include "cuda/block.h"
#include "math/codec.h"

namespace epi::cuda {

namespace math = epi::scalar;

// Ordered as the magnitudes are, NaN > inf > finite. What is not signed is never negative; a NaN that
// arithmetic made may have its sign set, and is the largest all the same.
template <bool kSigned>
EPI_KERNEL uint32_t magnitude_word(float x) {
  return kSigned ? math::bits_of(x) & math::kMagnitude : math::bits_of(x);
}

// floor(x + random_bits / 65536) on the code's scale. In its word, a code lies above 19 bits of fraction.
template <bool kSigned>
EPI_KERNEL uint32_t encode(float x, uint32_t random_bits, const math::Block<kSigned>& block) {
  if constexpr (kSigned) {
    // The smallest normal code becomes float32's smallest normal number, so that the multiplication lays
    // subnormals on their grid. No one float is the whole factor for every exponent.
    const float scaled = x * math::float_of((260u - block.exponent) << 23) * 0x1p-126f;
    const uint32_t word = math::bits_of(scaled) + (random_bits << 3);
    const uint32_t code = (((word << 5) & math::kMagnitude) | (word & ~math::kMagnitude)) >> 24;
    return block.finite ? code : math::kNonfiniteCode<true>;
  } else {
    const uint32_t word = math::bits_of(x);
    // of the two spacings, the one whose code is larger holds
    const uint32_t fine = word - ((block.exponent - math::kFineBias) << 23);
    const auto eighth = static_cast<uint32_t>(static_cast<int32_t>(fine) >> 3);
    const uint32_t coarse = eighth + ((math::kCoarseBias - math::kFineBias) << 20);
    const uint32_t sum = math::max_signed(fine, coarse) + (random_bits << 3);
    const uint32_t code = math::max_signed(sum, math::kLeast << 19) >> 19;
    return block.finite ? math::where_positive(code, word) : math::kNonfiniteCode<false>;
  }
}

// Exact. An (evenly spaced) code as a float32's word is a small number, mostly subnormal; two factors make it
// the value.
template <bool kSigned>
EPI_KERNEL float decode(uint32_t code, float factor) {
  uint32_t word = code << 19;
  if constexpr (kSigned) {
    word = ((code & 0x7Fu) << 19) | ((code & 0x80u) << 24);
  } else {
    word = math::evenly_spaced<float>(word);
  }
  return math::float_of(word) * 0x1p112f * factor;
}

}  // namespace epi::cuda
