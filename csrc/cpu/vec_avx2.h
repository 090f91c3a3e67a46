// Sixteen lanes in two AVX2 registers. A truth vector is a lane of ones or zeros.

#pragma once

#include "math/scalar.h"
#include "math/score.h"

namespace epi::EPI_ISA {

struct F16 {
  __m256 a, b;
};
struct U16 {
  __m256i a, b;
};
struct M16 {
  __m256i a, b;
};

template <>
struct Lanes<F16> {
  using U = U16;
  using M = M16;
  static EPI_INLINE F16 f32(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static EPI_INLINE U16 u32(uint32_t x) {
    const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
    return {v, v};
  }
  static EPI_INLINE U16 iota(uint32_t first) {
    const __m256i v = _mm256_set1_epi32(static_cast<int>(first));
    return {_mm256_add_epi32(v, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
            _mm256_add_epi32(v, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
  }
};

EPI_INLINE F16 operator+(F16 x, F16 y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
EPI_INLINE F16 operator-(F16 x, F16 y) {
  return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
EPI_INLINE F16 operator*(F16 x, F16 y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
EPI_INLINE F16 operator/(F16 x, F16 y) {
  return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
EPI_INLINE F16 sqrt_rn(F16 x) {
  return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)};
}
EPI_INLINE F16 min(F16 x, F16 y) {
  return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}
EPI_INLINE F16 max(F16 x, F16 y) {
  return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}

template <int kComparison>
EPI_INLINE M16 compare(F16 x, F16 y) {
  return {_mm256_castps_si256(_mm256_cmp_ps(x.a, y.a, kComparison)),
          _mm256_castps_si256(_mm256_cmp_ps(x.b, y.b, kComparison))};
}
EPI_INLINE M16 operator>=(F16 x, F16 y) {
  return compare<_CMP_GE_OQ>(x, y);
}
EPI_INLINE M16 operator<(F16 x, F16 y) {
  return compare<_CMP_LT_OQ>(x, y);
}
EPI_INLINE M16 operator!=(F16 x, F16 y) {
  return compare<_CMP_NEQ_UQ>(x, y);
}

EPI_INLINE U16 operator+(U16 x, U16 y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
EPI_INLINE U16 operator-(U16 x, U16 y) {
  return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)};
}
EPI_INLINE U16 operator*(U16 x, U16 y) {
  return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)};
}
EPI_INLINE U16 operator&(U16 x, U16 y) {
  return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)};
}
EPI_INLINE U16 operator^(U16 x, U16 y) {
  return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)};
}
EPI_INLINE U16 operator>>(U16 x, int count) {
  const __m128i c = _mm_cvtsi32_si128(count);
  return {_mm256_srl_epi32(x.a, c), _mm256_srl_epi32(x.b, c)};
}
EPI_INLINE M16 operator==(U16 x, U16 y) {
  return {_mm256_cmpeq_epi32(x.a, y.a), _mm256_cmpeq_epi32(x.b, y.b)};
}

EPI_INLINE M16 operator&(M16 x, M16 y) {
  return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)};
}
EPI_INLINE M16 operator|(M16 a, M16 b) {
  return {_mm256_or_si256(a.a, b.a), _mm256_or_si256(a.b, b.b)};
}
EPI_INLINE M16 operator!(M16 x) {
  const __m256i ones = _mm256_set1_epi32(-1);
  return {_mm256_xor_si256(x.a, ones), _mm256_xor_si256(x.b, ones)};
}
EPI_INLINE M16 operator!=(U16 x, U16 y) {
  return !(x == y);
}
// unsigned: x < y unless x is the larger of the two
EPI_INLINE M16 operator<(U16 x, U16 y) {
  return !(U16{_mm256_max_epu32(x.a, y.a), _mm256_max_epu32(x.b, y.b)} == x);
}
EPI_INLINE uint32_t to_bits(M16 x) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(x.a))) |
         static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(x.b))) << 8;
}
EPI_INLINE bool any(M16 x) {
  return !_mm256_testz_si256(_mm256_or_si256(x.a, x.b), _mm256_set1_epi32(-1));
}
template <class M>
EPI_INLINE M from_bits(uint32_t bits) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
  const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i high = _mm256_slli_epi32(low, 8);
  return {_mm256_cmpeq_epi32(_mm256_and_si256(all, low), low),
          _mm256_cmpeq_epi32(_mm256_and_si256(all, high), high)};
}

EPI_INLINE U16 bits_of(F16 x) {
  return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)};
}
EPI_INLINE F16 float_of(U16 x) {
  return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)};
}
EPI_INLINE U16 select(M16 where, U16 x, U16 y) {
  return {_mm256_blendv_epi8(y.a, x.a, where.a), _mm256_blendv_epi8(y.b, x.b, where.b)};
}
EPI_INLINE F16 select(M16 where, F16 x, F16 y) {
  return float_of(select(where, bits_of(x), bits_of(y)));
}

template <class F>
EPI_INLINE F load(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
EPI_INLINE __m256 load_half_bf16(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
template <class F>
EPI_INLINE F load(const uint16_t* p) {
  return {load_half_bf16(p), load_half_bf16(p + 8)};
}
EPI_INLINE void store(float* p, F16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
EPI_INLINE void store(uint32_t* p, U16 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
// Thirty-two elements at once. bfloat16 values lie two to a word: splitting them into the even and
// the odd elements takes one operation each way where widening in order takes two, and no element
// cares beside which others it is computed.
struct Pair {
  F16 a, b;  // in order: 0..15, 16..31; split: 0, 2, .. 30 and 1, 3, .. 31
};

EPI_INLINE U16 load_words(const void* p) {
  const __m256i* words = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(words), _mm256_loadu_si256(words + 1)};
}
EPI_INLINE Pair load_split(const uint16_t* p) {
  const U16 words = load_words(p);
  return {float_of(U16{_mm256_slli_epi32(words.a, 16), _mm256_slli_epi32(words.b, 16)}),
          float_of(words & Lanes<F16>::u32(0xFFFF0000u))};
}
template <int kWhich>  // 0x88: even elements, 0xDD: odd ones
EPI_INLINE __m256 every_second(const float* p) {
  const __m256 picked = _mm256_shuffle_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8), kWhich);
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(picked), 0xD8));
}
EPI_INLINE Pair load_split(const float* p) {
  return {{every_second<0x88>(p), every_second<0x88>(p + 16)},
          {every_second<0xDD>(p), every_second<0xDD>(p + 16)}};
}
EPI_INLINE F16 interleave(__m256 even, __m256 odd) {
  const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
}
EPI_INLINE Pair in_order(Pair split) {
  return {interleave(split.a.a, split.b.a), interleave(split.a.b, split.b.b)};
}
// The high halves of even and odd words, in order.
EPI_INLINE U16 join_halves(U16 even, U16 odd) {
  even = even >> 16;
  return {_mm256_blend_epi16(even.a, odd.a, 0xAA), _mm256_blend_epi16(even.b, odd.b, 0xAA)};
}
EPI_INLINE void store_words(void* p, U16 x) {
  __m256i* words = static_cast<__m256i*>(p);
  _mm256_storeu_si256(words, x.a);
  _mm256_storeu_si256(words + 1, x.b);
}
EPI_INLINE void store_halves(uint16_t* p, U16 even, U16 odd) {
  store_words(p, join_halves(even, odd));
}
// Lanes of bits 0, 2, .. 30.
EPI_INLINE M16 even_lanes(uint32_t bits) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
  const __m256i low = _mm256_setr_epi32(1, 1 << 2, 1 << 4, 1 << 6, 1 << 8, 1 << 10, 1 << 12, 1 << 14);
  const __m256i high = _mm256_slli_epi32(low, 16);
  return {_mm256_cmpeq_epi32(_mm256_and_si256(all, low), low),
          _mm256_cmpeq_epi32(_mm256_and_si256(all, high), high)};
}
// Elements whose bit in `keep` is set get `old` back, which is what was loaded from there.
EPI_INLINE void store_halves_but(uint16_t* p, uint32_t keep, U16 even, U16 odd, Pair old) {
  store_halves(p, select(even_lanes(keep), bits_of(old.a), even),
               select(even_lanes(keep >> 1), bits_of(old.b), odd));
}
EPI_INLINE void store_but(float* p, uint32_t keep, Pair x, Pair old) {
  store(p, select(from_bits<M16>(keep), old.a, x.a));
  store(p + 16, select(from_bits<M16>(keep >> 16), old.b, x.b));
}

// One of the two is no number.
EPI_INLINE M16 unordered(F16 x, F16 y) {
  return compare<_CMP_UNORD_Q>(x, y);
}
EPI_INLINE M16 is_finite(F16 x) {
  return float_of(bits_of(x) & Lanes<F16>::u32(0x7FFFFFFFu)) < Lanes<F16>::f32(float_of(0x7F800000u));
}
EPI_INLINE U16 increment(U16 x, M16 where) {
  return {_mm256_sub_epi32(x.a, where.a), _mm256_sub_epi32(x.b, where.b)};
}

// Thirty-two bfloat16 values: a bit each where bound <= word < +inf. For a positive bound the words
// compare as signed integers do; negative values and NaNs of either sign fall outside.
EPI_INLINE __m256i finite_from_half(__m256i words, int bound) {
  const __m256i infinity = _mm256_set1_epi16(static_cast<short>(kBfloat16Infinity));
  const __m256i below = _mm256_set1_epi16(static_cast<short>(bound - 1));
  return _mm256_and_si256(_mm256_cmpgt_epi16(words, below), _mm256_cmpgt_epi16(infinity, words));
}
EPI_INLINE uint32_t finite_from(const uint16_t* p, int bound) {
  const U16 words = load_words(p);
  const __m256i bytes =
      _mm256_packs_epi16(finite_from_half(words.a, bound), finite_from_half(words.b, bound));
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xD8)));
}

// Sixteen float64 accumulators; lane i takes the elements with position % 16 == i on every ISA.
struct D16 {
  __m256d v[4];
};
EPI_INLINE D16 zero_d16() {
  const __m256d z = _mm256_setzero_pd();
  return {{z, z, z, z}};
}
EPI_INLINE void add_moments(D16& sum, D16& sum_of_squares, F16 x) {
  const __m256d wide[4] = {
      _mm256_cvtps_pd(_mm256_castps256_ps128(x.a)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.a, 1)),
      _mm256_cvtps_pd(_mm256_castps256_ps128(x.b)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.b, 1))};
  for (int i = 0; i < 4; ++i) {
    sum.v[i] = _mm256_add_pd(sum.v[i], wide[i]);
    sum_of_squares.v[i] = _mm256_add_pd(sum_of_squares.v[i], _mm256_mul_pd(wide[i], wide[i]));
  }
}
EPI_INLINE void store(double* p, D16 x) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, x.v[i]);
}

}  // namespace epi::EPI_ISA
