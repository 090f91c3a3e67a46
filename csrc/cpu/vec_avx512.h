// Sixteen lanes in one AVX-512 register. A truth vector is a mask register, and sixteen packed mask
// bits are one as they stand.

#pragma once

#include "cpu/twice.h"
#include "math/scalar.h"
#include "math/score.h"

namespace epi::EPI_ISA {

struct F16 {
  __m512 v;
};
struct U16 {
  __m512i v;
};
struct M16 {
  __mmask16 k;
};

template <>
struct Lanes<F16> {
  using U = U16;
  using M = M16;
  static EPI_INLINE F16 f32(float x) { return {_mm512_set1_ps(x)}; }
  static EPI_INLINE U16 u32(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
  static EPI_INLINE U16 iota(uint32_t first) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_add_epi32(u32(first).v, lane)};
  }
};

EPI_INLINE F16 operator+(F16 a, F16 b) {
  return {_mm512_add_ps(a.v, b.v)};
}
EPI_INLINE F16 operator-(F16 a, F16 b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
EPI_INLINE F16 operator*(F16 a, F16 b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
EPI_INLINE F16 operator/(F16 a, F16 b) {
  return {_mm512_div_ps(a.v, b.v)};
}
EPI_INLINE F16 sqrt_rn(F16 a) {
  return {_mm512_sqrt_ps(a.v)};
}
EPI_INLINE F16 min(F16 a, F16 b) {
  return {_mm512_min_ps(a.v, b.v)};
}
EPI_INLINE F16 max(F16 a, F16 b) {
  return {_mm512_max_ps(a.v, b.v)};
}
EPI_INLINE M16 operator>=(F16 a, F16 b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)};
}
EPI_INLINE M16 operator<(F16 a, F16 b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
}
EPI_INLINE M16 operator!=(F16 a, F16 b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ)};
}

EPI_INLINE U16 operator+(U16 a, U16 b) {
  return {_mm512_add_epi32(a.v, b.v)};
}
EPI_INLINE U16 operator-(U16 a, U16 b) {
  return {_mm512_sub_epi32(a.v, b.v)};
}
EPI_INLINE U16 operator*(U16 a, U16 b) {
  return {_mm512_mullo_epi32(a.v, b.v)};
}
EPI_INLINE U16 operator&(U16 a, U16 b) {
  return {_mm512_and_si512(a.v, b.v)};
}
EPI_INLINE U16 operator^(U16 a, U16 b) {
  return {_mm512_xor_si512(a.v, b.v)};
}
EPI_INLINE U16 operator>>(U16 a, int count) {
  return {_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(count))};
}
EPI_INLINE M16 operator==(U16 a, U16 b) {
  return {_mm512_cmpeq_epi32_mask(a.v, b.v)};
}
EPI_INLINE M16 operator!=(U16 a, U16 b) {
  return {_mm512_cmpneq_epi32_mask(a.v, b.v)};
}
EPI_INLINE M16 operator<(U16 a, U16 b) {
  return {_mm512_cmplt_epu32_mask(a.v, b.v)};
}

EPI_INLINE M16 operator&(M16 a, M16 b) {
  return {static_cast<__mmask16>(a.k & b.k)};
}
EPI_INLINE M16 operator|(M16 a, M16 b) {
  return {static_cast<__mmask16>(a.k | b.k)};
}
EPI_INLINE M16 operator!(M16 a) {
  return {static_cast<__mmask16>(~a.k)};
}
EPI_INLINE bool any(M16 a) {
  return a.k != 0;
}
EPI_INLINE uint32_t to_bits(M16 a) {
  return a.k;
}
template <class M>
EPI_INLINE M from_bits(uint32_t bits) {
  return {static_cast<__mmask16>(bits)};
}

EPI_INLINE F16 select(M16 where, F16 a, F16 b) {
  return {_mm512_mask_blend_ps(where.k, b.v, a.v)};
}
EPI_INLINE U16 select(M16 where, U16 a, U16 b) {
  return {_mm512_mask_blend_epi32(where.k, b.v, a.v)};
}
EPI_INLINE U16 bits_of(F16 a) {
  return {_mm512_castps_si512(a.v)};
}
EPI_INLINE F16 float_of(U16 a) {
  return {_mm512_castsi512_ps(a.v)};
}

template <class F>
EPI_INLINE F load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
template <class F>
EPI_INLINE F load(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
EPI_INLINE void store(float* p, F16 a) {
  _mm512_storeu_ps(p, a.v);
}
EPI_INLINE void store(uint32_t* p, U16 a) {
  _mm512_storeu_si512(p, a.v);
}
using StepF = F16;
constexpr int kStepWidth = 16;
EPI_INLINE U16 kept(U16 x) {
  return x;
}
EPI_INLINE U16 folded_halves(U16 x) {
  return (x ^ (x >> 16)) & Lanes<F16>::u32(0xFFFFu);
}
// Thirty-two elements at once. bfloat16 values lie two to a word: splitting them into the even and
// the odd elements takes one operation each way where widening in order takes two, and no element
// cares beside which others it is computed.
// Halves in order: 0..15, 16..31; split: 0, 2, .. 30 and 1, 3, .. 31.
using Pair = Twice<F16>;

EPI_INLINE Pair load_in_order(const float* p) {
  return {load<F16>(p), load<F16>(p + 16)};
}
EPI_INLINE Pair load_split(const uint16_t* p) {
  const __m512i words = _mm512_loadu_si512(p);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)))}};
}
EPI_INLINE Pair load_split(const float* p) {
  const __m512 low = _mm512_loadu_ps(p), high = _mm512_loadu_ps(p + 16);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {{_mm512_permutex2var_ps(low, even, high)}, {_mm512_permutex2var_ps(low, odd, high)}};
}
// The high halves of even and odd words, in order.
EPI_INLINE __m512i join_halves(U16 even, U16 odd) {
  return _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(even.v, 16), odd.v);
}
EPI_INLINE Pair in_order(Pair split) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  return {{_mm512_permutex2var_ps(split.a.v, low, split.b.v)},
          {_mm512_permutex2var_ps(split.a.v, high, split.b.v)}};
}
EPI_INLINE void store_halves(uint16_t* p, U16 even, U16 odd) {
  _mm512_storeu_si512(p, join_halves(even, odd));
}
// Elements whose bit in `keep` is set stay as they are in memory; `old` is what was loaded there.
EPI_INLINE void store_halves_but(uint16_t* p, uint32_t keep, U16 even, U16 odd, Pair) {
  _mm512_mask_storeu_epi16(p, ~keep, join_halves(even, odd));
}
EPI_INLINE void store_but(float* p, uint32_t keep, Pair x, Pair) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(~keep), x.a.v);
  _mm512_mask_storeu_ps(p + 16, static_cast<__mmask16>(~keep >> 16), x.b.v);
}

// One of the two is no number.
EPI_INLINE M16 unordered(F16 x, F16 y) {
  return {_mm512_cmp_ps_mask(x.v, y.v, _CMP_UNORD_Q)};
}
EPI_INLINE M16 is_finite(F16 x) {
  return !M16{_mm512_fpclass_ps_mask(x.v, 0x99)};  // NaNs and infinities
}
EPI_INLINE U16 increment(U16 x, M16 where) {
  return {_mm512_mask_add_epi32(x.v, where.k, x.v, _mm512_set1_epi32(1))};
}

// Thirty-two bfloat16 values: a bit each where bound <= word < +inf, bound[1] where the old bit is set. For
// positive bounds the words compare as signed integers do; negative values and NaNs of either sign fall
// outside.
EPI_INLINE uint32_t finite_from(const uint16_t* p, const int bound[2], uint32_t old) {
  const __m512i words = _mm512_loadu_si512(p);
  const __m512i bounds = _mm512_mask_blend_epi16(old, _mm512_set1_epi16(static_cast<short>(bound[0])),
                                                 _mm512_set1_epi16(static_cast<short>(bound[1])));
  const __mmask32 finite =
      _mm512_cmplt_epi16_mask(words, _mm512_set1_epi16(static_cast<short>(kBfloat16Infinity)));
  return _mm512_mask_cmpge_epi16_mask(finite, words, bounds);
}

// Extrema of finite words in the order of the numbers they are.
struct WordExtrema {
  __m512i low, high;
};
EPI_INLINE WordExtrema no_words() {
  return {_mm512_set1_epi16(0x7FFF), _mm512_set1_epi16(-0x8000)};
}
// Adds thirty-two words; how many of them are finite.
EPI_INLINE int add_words(WordExtrema& e, const uint16_t* p) {
  const __m512i words = _mm512_loadu_si512(p), magnitude = _mm512_set1_epi16(0x7FFF);
  const __mmask32 finite = _mm512_cmplt_epi16_mask(_mm512_and_si512(words, magnitude),
                                                   _mm512_set1_epi16(static_cast<short>(kBfloat16Infinity)));
  const __m512i ordered = _mm512_xor_si512(words, _mm512_and_si512(_mm512_srai_epi16(words, 15), magnitude));
  e.low = _mm512_mask_min_epi16(e.low, finite, e.low, ordered);
  e.high = _mm512_mask_max_epi16(e.high, finite, e.high, ordered);
  return __builtin_popcount(finite);
}
EPI_INLINE void store(int16_t* low, int16_t* high, const WordExtrema& e) {  // [32] each
  _mm512_storeu_si512(low, e.low);
  _mm512_storeu_si512(high, e.high);
}

// Sixteen float64 accumulators; lane i takes the elements with position % 16 == i on every ISA.
struct D16 {
  __m512d a, b;
};
EPI_INLINE D16 zero_d16() {
  return {_mm512_setzero_pd(), _mm512_setzero_pd()};
}
// The square of a float32 is exact in float64: one rounding with the sum or two, the bits are the same.
EPI_INLINE void add_moments(D16& sum, D16& sum_of_squares, F16 x) {
  const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(x.v));
  const __m512d b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1));
  sum.a = _mm512_add_pd(sum.a, a);
  sum.b = _mm512_add_pd(sum.b, b);
  sum_of_squares.a = _mm512_fmadd_pd(a, a, sum_of_squares.a);
  sum_of_squares.b = _mm512_fmadd_pd(b, b, sum_of_squares.b);
}
EPI_INLINE void store(double* p, D16 x) {
  _mm512_storeu_pd(p, x.a);
  _mm512_storeu_pd(p + 8, x.b);
}

}  // namespace epi::EPI_ISA
