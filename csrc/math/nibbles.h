// 4-bit states: two codes a byte, a bfloat16 scale a block (epi_kernels/reference/nibbles.py).
//
// Scales are handled as the float32 words that they are the upper halves of. Sixteen random bits are added
// below a code, as in math/codec.h.

#pragma once

#include "math/scalar.h"

namespace epi::EPI_ISA {

constexpr uint32_t kNibbleLimit = 250u << 23;     // words from which a block is not finite
constexpr uint32_t kLowestScale = 24u << 23;      // the smallest scale but 0, 2^-103
constexpr uint32_t kInfiniteScale = 0x7F800000u;  // of an exp_avg_sq that is not finite; its codes are 15
constexpr uint32_t kNaNScale = 0x7FC00000u;       // of an exp_avg that is not finite; its codes are 0
constexpr uint32_t kUpperHalf = 0xFFFF0000u;
constexpr uint32_t kNearestSquare = 1u << 22;  // "random bits" of an exp_avg_sq that round to nearest
constexpr float kThird = 0x1.555556p-2f, kTwoThirds = 0x1.555556p-1f, kTwelfth = 0x1.555556p-4f;

// By code: values in units of the scale, and of these the roots, in units of which exp_avg is coded.
#define EPI_LEVELS                                                                                           \
  0.0f, 0x1p-16f, 0x1p-14f, 0x1p-12f, 0x1p-10f, 0x1p-8f, 0x1p-7f, 0x1p-6f, 0x1p-5f, 0x1p-4f, 0x1p-3f, 0.25f, \
      0.5f, 0.75f, 1.0f, 1.5f
constexpr float kRoots2 = 0x1.6a09e6p-1f, kRoots3 = 0x1.bb67aep-1f,
                kRoots6 = 0x1.3988e2p+0f;  // of 1/2, 3/4, 3/2
#define EPI_ROOTS                                                                                \
  0x1p-8f, 0x1p-8f, 0x1p-7f, 0x1p-6f, 0x1p-5f, 0x1p-4f, kRoots2 / 8, 0.125f, kRoots2 / 4, 0.25f, \
      kRoots2 / 2, 0.5f, kRoots2, kRoots3, 1.0f, kRoots6

// The largest |exp_avg| / sqrt(exp_avg_sq) that gradients can make.
EPI_INLINE float moment_bound(float beta1, float one_minus_beta1, float beta2, float one_minus_beta2) {
  const float ratio = beta1 * beta1 / beta2;
  if (!(ratio < 1.0f)) return float_of(kInfiniteScale);
  return one_minus_beta1 / sqrt_rn(one_minus_beta2 * (1.0f - ratio));
}

// How a block's exp_avg_sq is encoded.
struct SquareGrid {
  uint32_t scale;  // word
  float gain;      // the scale becomes 2^17
};
// `top`: the word of the largest value. `old`: the scale up to now, whose mantissa stays.
EPI_INLINE SquareGrid square_grid(uint32_t top, uint32_t old) {
  const bool finite = top < kNibbleLimit;
  const uint32_t finite_top = finite ? top : 0;
  const uint32_t mantissa = (old != 0 && old < kInfiniteScale ? old : finite_top) & 0x7F0000u;
  const float inverse = 1.0f / float_of(mantissa | 0x3F800000u);
  uint32_t exponent = (bits_of(float_of(finite_top) * inverse) + 0x3FFFFFu) >> 23;
  exponent = exponent < (kLowestScale >> 23) ? kLowestScale >> 23 : exponent;
  const uint32_t scale = !finite ? kInfiniteScale : top == 0 ? 0 : (exponent << 23 | mantissa);
  return {scale, inverse * float_of((271 - exponent) << 23)};
}

// Of a finite block. 0 is 0, and no other value is. `random`: 23 bits.
template <class F>
EPI_INLINE typename Lanes<F>::U square_code(F x, F gain, typename Lanes<F>::U random) {
  using L = Lanes<F>;
  using U = typename L::U;
  const F y = x * gain;
  const U word = bits_of(y), middle = word - L::u32(131u << 23);
  // a level a binade, and from the second highest on two
  const U two = middle + middle - L::u32(12u << 23);
  const U fine = (select(L::u32(143u << 23) < word, two, middle) + random) >> 23;
  // a level every second binade: what lies between two, as a share of the way, in one binade
  const F below = float_of(word & L::u32(0x7F000000u));
  const U share = bits_of(y * L::f32(kThird) + below * L::f32(kTwoThirds)) + L::u32(1u << 23);
  const U coarse = ((share + random) >> 24) - L::u32(63);
  const U code = max_signed(select(word < L::u32(136u << 23), coarse, fine), L::u32(1));
  return where_positive(code, bits_of(x));
}

// How a block's exp_avg is encoded.
struct AverageGrid {
  uint32_t scale;  // word
  float inverse;   // of the scale
};
// `top`: the word of the largest scaled value. `square`: exp_avg_sq's new scale.
EPI_INLINE AverageGrid average_grid(uint32_t top, float bound, uint32_t square) {
  const bool finite = top < kNibbleLimit;
  float largest = float_of(finite ? top : 0);
  const float cut = bound * sqrt_rn(float_of(square));
  largest = cut < largest ? cut : largest;
  float scale = float_of((bits_of(largest * kTwelfth) + 0xFFFFu) & kUpperHalf);
  scale = scale < float_of(kLowestScale) ? float_of(kLowestScale) : scale;
  return {!finite ? kNaNScale : top == 0 ? 0 : bits_of(scale), 1.0f / scale};
}

// Of a finite block. `scaled`: |x| over the root of its exp_avg_sq's code; `random`: 16 bits.
template <class F>
EPI_INLINE typename Lanes<F>::U average_code(F x, F scaled, F inverse, typename Lanes<F>::U random) {
  using L = Lanes<F>;
  using U = typename L::U;
  const F y = min(scaled * inverse, L::f32(12.0f));
  // the smallest normal is 2; below it, adding 2 lays the subnormals on their grid
  const U word = max_signed(bits_of(y), bits_of(y + L::f32(2.0f)) - L::u32(1u << 23));
  const U magnitude = (((word >> 6) + random) >> 16) - L::u32(254);
  return magnitude + ((bits_of(x) >> 28) & L::u32(8));
}

}  // namespace epi::EPI_ISA
