// 8-bit states: a byte an element, a power-of-two scale a block (epi_kernels/reference/codec.py).
//
// A code is rounded as bfloat16 is (math/rounding.h): sixteen random bits are added below it, and it is
// what then lies in the low byte of the word's high half.

#pragma once

#include "math/scalar.h"

namespace epi::EPI_ISA {

constexpr int kCodeBlock = 64;             // elements that share a scale
constexpr uint32_t kNearest = 0x8000u;     // "random bits" that round to nearest
constexpr uint32_t kNonfiniteScale = 255;  // of a block that is not finite: NaN or, unsigned, +inf

constexpr uint32_t kLowestExponent = 24;
constexpr uint32_t kMagnitude = 0x7FFFFFFFu;

template <bool kSigned>
constexpr uint32_t kNonfiniteCode = kSigned ? 0 : 255;  // of its elements

// Unsigned codes: sixteen to a binade, and two below the code kFine. A positive value becomes kLeast at
// least; what lies below is not used.
constexpr uint32_t kFine = 16, kLeast = 4;
constexpr uint32_t kFineBias = 15, kCoarseBias = 22;  // code 0 would stand for 2^-bias, were it no zero

// exp_avg is signed; exp_avg_sq and the importance are not.
template <bool kSigned>
struct Block {
  uint32_t exponent;  // biased, of the largest magnitude
  bool finite;

  // `top`: the largest of the values' words without their signs, compared as integers. One in the last
  // 1/16 of its binade takes the next one, so that rounding up never overflows a code.
  static EPI_INLINE Block of_values(uint32_t top) {
    const uint32_t exponent = (top + 0x7FFFFu) >> 23;
    return {exponent < kLowestExponent ? kLowestExponent : exponent, exponent < (kSigned ? 247u : 255u)};
  }
  static EPI_INLINE Block of_scale(uint32_t scale) {
    return {scale + kLowestExponent, scale != kNonfiniteScale};
  }

  EPI_INLINE uint32_t scale() const { return finite ? exponent - kLowestExponent : kNonfiniteScale; }

  // What half_of_code() is multiplied by. A block that is not finite has the codes kNonfiniteCode.
  EPI_INLINE float factor() const {
    if (!finite) return float_of(kSigned ? 0x7FC00000u : 0x7F800000u);
    return float_of((kSigned ? exponent + 8 : exponent - 7) << 23);
  }
};

// Unsigned codes as evenly spaced ones below kFine too: sixteen to a binade everywhere. `code19`: code << 19.
template <class F>
EPI_INLINE typename Lanes<F>::U evenly_spaced(typename Lanes<F>::U code19) {
  using L = Lanes<F>;
  const auto fine = L::u32(kFine << 19);
  return code19 + select(code19 < fine, code19, fine) * L::u32(7);
}

// The IEEE binary16 number `code << 6`, of a code without its sign, or evenly spaced: times the block's
// factor, the value. `code19`: code << 19. Below the smallest normal, the difference takes the hidden bit
// away again.
template <class F>
EPI_INLINE F half_of_code(typename Lanes<F>::U code19) {
  using L = Lanes<F>;
  const F normal = float_of(code19 + L::u32(0x38000000u));
  const F subnormal = float_of(code19 + L::u32(0x38800000u)) - L::f32(float_of(0x38800000u));
  return select(subnormal < normal, subnormal, normal);
}

// Constants of a finite block's encoding.
template <class F>
struct Grid {
  F normal, subnormal;        // signed: the block's smallest normal number becomes 4, and 2
  typename Lanes<F>::U base;  // unsigned: the word of what code 0 would be with two codes to a binade
};
template <class F, bool kSigned>
EPI_INLINE Grid<F> grid(const Block<kSigned>& block) {
  using L = Lanes<F>;
  if constexpr (kSigned) {
    const float subnormal = float_of((261 - block.exponent) << 23);
    return {L::f32(2 * subnormal), L::f32(subnormal), L::u32(0)};
  } else {
    return {L::f32(0), L::f32(0), L::u32((block.exponent - kCoarseBias) << 23)};
  }
}

// What the random bits are added to, of a finite block's element. Signed: without the sign, and with a
// bit above the byte. The sum with 2 lays what lies below the smallest normal on its grid.
template <class F>
EPI_INLINE typename Lanes<F>::U code_word_signed(F x, const Grid<F>& grid) {
  using L = Lanes<F>;
  const F magnitude = float_of(bits_of(x) & L::u32(kMagnitude));
  const F subnormal = add_exact_product(magnitude, grid.subnormal, L::f32(2.0f));
  return max_signed(bits_of(magnitude * grid.normal), bits_of(subnormal)) >> 3;
}

// Of the two spacings, the one whose code is larger holds. A positive value never becomes 0.
template <class F>
EPI_INLINE typename Lanes<F>::U code_word_unsigned(F x, const Grid<F>& grid) {
  using L = Lanes<F>;
  const auto word = bits_of(x);
  const auto above = max_signed(word - grid.base, where_positive(L::u32(kLeast << 22), word));
  return max_signed((above >> 3) - L::u32((kCoarseBias - kFineBias) << 20), above >> 6);
}

// The smallest code, of an unsigned finite block, whose value is at least `bound`; 256 where none is.
EPI_INLINE int code_bound(const Block<false>& block, float bound) {
  if (!(bound > 0.0f)) return 0;
  const int64_t word = bits_of(bound), exponent = block.exponent;
  const int64_t fine = (word - ((exponent - kFineBias) << 23) + 0x7FFFF) >> 19;
  const int64_t coarse = (word - ((exponent - kCoarseBias) << 23) + 0x3FFFFF) >> 22;
  const int64_t code = fine > coarse ? fine : coarse;
  return static_cast<int>(code < kLeast ? kLeast : code > 256 ? 256 : code);
}

}  // namespace epi::EPI_ISA
