// Eight lanes in an AVX2 register, sixteen in two. A truth vector is a lane of ones or zeros.

#pragma once

#include "cpu/twice.h"
#include "math/scalar.h"
#include "math/score.h"

namespace epi::EPI_ISA {

struct F8 {
  __m256 v;
};
struct U8 {
  __m256i v;
};
struct M8 {
  __m256i v;
};

template <>
struct Lanes<F8> {
  using U = U8;
  using M = M8;
  static EPI_INLINE F8 f32(float x) { return {_mm256_set1_ps(x)}; }
  static EPI_INLINE U8 u32(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
  static EPI_INLINE U8 iota(uint32_t first) {
    return {_mm256_add_epi32(u32(first).v, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))};
  }
};

EPI_INLINE F8 operator+(F8 x, F8 y) {
  return {_mm256_add_ps(x.v, y.v)};
}
EPI_INLINE F8 operator-(F8 x, F8 y) {
  return {_mm256_sub_ps(x.v, y.v)};
}
EPI_INLINE F8 operator*(F8 x, F8 y) {
  return {_mm256_mul_ps(x.v, y.v)};
}
EPI_INLINE F8 operator/(F8 x, F8 y) {
  return {_mm256_div_ps(x.v, y.v)};
}
EPI_INLINE F8 sqrt_rn(F8 x) {
  return {_mm256_sqrt_ps(x.v)};
}
EPI_INLINE F8 min(F8 x, F8 y) {
  return {_mm256_min_ps(x.v, y.v)};
}
EPI_INLINE F8 max(F8 x, F8 y) {
  return {_mm256_max_ps(x.v, y.v)};
}

template <int kComparison>
EPI_INLINE M8 compare(F8 x, F8 y) {
  return {_mm256_castps_si256(_mm256_cmp_ps(x.v, y.v, kComparison))};
}
EPI_INLINE M8 operator>=(F8 x, F8 y) {
  return compare<_CMP_GE_OQ>(x, y);
}
EPI_INLINE M8 operator<(F8 x, F8 y) {
  return compare<_CMP_LT_OQ>(x, y);
}
EPI_INLINE M8 operator!=(F8 x, F8 y) {
  return compare<_CMP_NEQ_UQ>(x, y);
}

EPI_INLINE U8 operator+(U8 x, U8 y) {
  return {_mm256_add_epi32(x.v, y.v)};
}
EPI_INLINE U8 operator-(U8 x, U8 y) {
  return {_mm256_sub_epi32(x.v, y.v)};
}
EPI_INLINE U8 operator*(U8 x, U8 y) {
  return {_mm256_mullo_epi32(x.v, y.v)};
}
EPI_INLINE U8 operator&(U8 x, U8 y) {
  return {_mm256_and_si256(x.v, y.v)};
}
EPI_INLINE U8 operator^(U8 x, U8 y) {
  return {_mm256_xor_si256(x.v, y.v)};
}
EPI_INLINE U8 operator>>(U8 x, int count) {
  return {_mm256_srl_epi32(x.v, _mm_cvtsi32_si128(count))};
}
EPI_INLINE M8 operator==(U8 x, U8 y) {
  return {_mm256_cmpeq_epi32(x.v, y.v)};
}

EPI_INLINE M8 operator&(M8 x, M8 y) {
  return {_mm256_and_si256(x.v, y.v)};
}
EPI_INLINE M8 operator|(M8 x, M8 y) {
  return {_mm256_or_si256(x.v, y.v)};
}
EPI_INLINE M8 operator!(M8 x) {
  return {_mm256_xor_si256(x.v, _mm256_set1_epi32(-1))};
}
EPI_INLINE M8 operator!=(U8 x, U8 y) {
  return !(x == y);
}
// unsigned: x < y unless x is the larger of the two
EPI_INLINE M8 operator<(U8 x, U8 y) {
  return !(U8{_mm256_max_epu32(x.v, y.v)} == x);
}
EPI_INLINE uint32_t to_bits(M8 x) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(x.v)));
}
EPI_INLINE bool any(M8 x) {
  return !_mm256_testz_si256(x.v, x.v);
}

EPI_INLINE U8 bits_of(F8 x) {
  return {_mm256_castps_si256(x.v)};
}
EPI_INLINE F8 float_of(U8 x) {
  return {_mm256_castsi256_ps(x.v)};
}
EPI_INLINE U8 select(M8 where, U8 x, U8 y) {
  return {_mm256_blendv_epi8(y.v, x.v, where.v)};
}
EPI_INLINE F8 select(M8 where, F8 x, F8 y) {
  return float_of(select(where, bits_of(x), bits_of(y)));
}
EPI_INLINE M8 is_finite(F8 x) {
  return float_of(bits_of(x) & Lanes<F8>::u32(0x7FFFFFFFu)) < Lanes<F8>::f32(float_of(0x7F800000u));
}
EPI_INLINE U8 increment(U8 x, M8 where) {
  return {_mm256_sub_epi32(x.v, where.v)};
}

EPI_INLINE F8 load8(const float* p) {
  return {_mm256_loadu_ps(p)};
}
EPI_INLINE F8 load8(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
EPI_INLINE U8 load_words(const void* p) {
  return {_mm256_loadu_si256(static_cast<const __m256i*>(p))};
}
EPI_INLINE void store(float* p, F8 x) {
  _mm256_storeu_ps(p, x.v);
}
EPI_INLINE void store(void* p, U8 x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), x.v);
}

// A lane each of bits 0 to 7.
EPI_INLINE M8 spread(uint32_t bits) {
  const __m256i bit = _mm256_setr_epi32(1, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7);
  return {_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit), bit)};
}

// --- sixteen lanes

using F16 = Twice<F8>;
using U16 = Twice<U8>;
using M16 = Twice<M8>;

EPI_INLINE U16 increment(const U16& x, const M16& where) {
  return twice(increment(x.a, where.a), increment(x.b, where.b));
}
EPI_INLINE M16 is_finite(const F16& x) {
  return twice(is_finite(x.a), is_finite(x.b));
}
EPI_INLINE uint32_t to_bits(const M16& x) {
  return to_bits(x.a) | to_bits(x.b) << 8;
}
template <class M>
EPI_INLINE M from_bits(uint32_t bits) {
  return twice(spread(bits), spread(bits >> 8));
}
template <class F, class T>
EPI_INLINE F load(const T* p) {
  return twice(load8(p), load8(p + 8));
}
template <class T, class H>
EPI_INLINE void store(T* p, const Twice<H>& x) {
  store(p, x.a);
  store(p + 8, x.b);
}

// --- the step

// The step takes eight lanes at a time: sixteen registers hold what is computed from two of them,
// not from four.
using StepF = F8;
constexpr int kStepWidth = 8;

// A constant that the compiler must keep rather than make anew: GCC broadcasts it every time, on the
// pipes that are scarce, where a load would be free.
EPI_INLINE U8 kept(U8 x) {
  asm("" : "+x"(x.v));
  return x;
}
// The high half of every word, in its low half; what is above it is noise. A multiply-add of halves
// where a shift would do: Zen 4 shifts on the pipe that divides.
EPI_INLINE __m256i high_half_with_noise(__m256i x) {
  return _mm256_madd_epi16(x, _mm256_set1_epi32(0x00010000));
}
EPI_INLINE U8 folded_halves(U8 x) {
  return (x ^ U8{high_half_with_noise(x.v)}) & Lanes<F8>::u32(0xFFFFu);
}
// Sixteen elements at once. bfloat16 values lie two to a word: splitting them into the even and the
// odd elements takes one operation each way where widening in order takes two, and no element cares
// beside which others it is computed.
// Halves in order: 0..7, 8..15; split: 0, 2, .. 14 and 1, 3, .. 15.
using Pair = Twice<F8>;

EPI_INLINE Pair load_in_order(const float* p) {
  return {load8(p), load8(p + 8)};
}
EPI_INLINE Pair load_split(const uint16_t* p) {
  const U8 words = load_words(p);
  return {float_of(U8{_mm256_slli_epi32(words.v, 16)}), float_of(words & Lanes<F8>::u32(0xFFFF0000u))};
}
template <int kWhich>  // 0x88: even elements, 0xDD: odd ones
EPI_INLINE F8 every_second(const float* p) {
  const __m256 picked = _mm256_shuffle_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8), kWhich);
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(picked), 0xD8))};
}
EPI_INLINE Pair load_split(const float* p) {
  return {every_second<0x88>(p), every_second<0xDD>(p)};
}
EPI_INLINE Pair in_order(Pair split) {
  const __m256 low = _mm256_unpacklo_ps(split.a.v, split.b.v);
  const __m256 high = _mm256_unpackhi_ps(split.a.v, split.b.v);
  return {{_mm256_permute2f128_ps(low, high, 0x20)}, {_mm256_permute2f128_ps(low, high, 0x31)}};
}
// The high halves of even and odd words, in order.
EPI_INLINE U8 join_halves(U8 even, U8 odd) {
  return {_mm256_blend_epi16(high_half_with_noise(even.v), odd.v, 0xAA)};
}
EPI_INLINE void store_halves(uint16_t* p, U8 even, U8 odd) {
  store(p, join_halves(even, odd));
}
// Elements whose bit in `keep` is set stay as they are in memory, which still holds what was loaded.
EPI_INLINE void store_halves_but(uint16_t* p, uint32_t keep, U8 even, U8 odd, Pair) {
  const __m256i bit = _mm256_setr_epi16(1, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7, 1 << 8,
                                        1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, -0x8000);
  const __m256i kept = _mm256_and_si256(_mm256_set1_epi16(static_cast<short>(keep)), bit);
  store(p, select(M8{_mm256_cmpeq_epi16(kept, bit)}, load_words(p), join_halves(even, odd)));
}
EPI_INLINE void store_but(float* p, uint32_t keep, Pair x, Pair old) {
  store(p, select(spread(keep), old.a, x.a));
  store(p + 8, select(spread(keep >> 8), old.b, x.b));
}
// One of the two is no number.
EPI_INLINE M8 unordered(F8 x, F8 y) {
  return compare<_CMP_UNORD_Q>(x, y);
}

// --- bfloat16 words as they are, thirty-two at a time

// A bit each where bound <= word < +inf. For a positive bound the words compare as signed integers
// do; negative values and NaNs of either sign fall outside.
EPI_INLINE __m256i finite_from_half(__m256i words, int bound) {
  const __m256i infinity = _mm256_set1_epi16(static_cast<short>(kBfloat16Infinity));
  const __m256i below = _mm256_set1_epi16(static_cast<short>(bound - 1));
  return _mm256_and_si256(_mm256_cmpgt_epi16(words, below), _mm256_cmpgt_epi16(infinity, words));
}
EPI_INLINE uint32_t finite_from(const uint16_t* p, int bound) {
  const __m256i bytes = _mm256_packs_epi16(finite_from_half(load_words(p).v, bound),
                                           finite_from_half(load_words(p + 16).v, bound));
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xD8)));
}
// The same with a bound by old bit.
EPI_INLINE uint32_t finite_from(const uint16_t* p, const int bound[2], uint32_t old) {
  const uint32_t in = finite_from(p, bound[0]);
  return old == 0 ? in : (finite_from(p, bound[1]) & old) | (in & ~old);
}

// Extrema of finite words in the order of the numbers they are, as ordered_word() makes it.
struct WordExtrema {
  __m256i low, high;
};
EPI_INLINE WordExtrema no_words() {
  return {_mm256_set1_epi16(0x7FFF), _mm256_set1_epi16(-0x8000)};
}
EPI_INLINE uint32_t add_words_half(WordExtrema& e, __m256i words) {
  const __m256i magnitude = _mm256_set1_epi16(0x7FFF);
  const __m256i finite = _mm256_cmpgt_epi16(_mm256_set1_epi16(static_cast<short>(kBfloat16Infinity)),
                                            _mm256_and_si256(words, magnitude));
  const __m256i ordered = _mm256_xor_si256(words, _mm256_and_si256(_mm256_srai_epi16(words, 15), magnitude));
  e.low = _mm256_min_epi16(e.low, _mm256_blendv_epi8(magnitude, ordered, finite));
  e.high = _mm256_max_epi16(e.high, _mm256_blendv_epi8(_mm256_set1_epi16(-0x8000), ordered, finite));
  return static_cast<uint32_t>(_mm256_movemask_epi8(finite));
}
// Adds thirty-two words; how many of them are finite.
EPI_INLINE int add_words(WordExtrema& e, const uint16_t* p) {
  const uint32_t first = add_words_half(e, load_words(p).v), second = add_words_half(e, load_words(p + 16).v);
  return __builtin_popcountll(static_cast<uint64_t>(second) << 32 | first) / 2;
}
EPI_INLINE void store(int16_t* low, int16_t* high, const WordExtrema& e) {  // [32] each
  for (int i = 0; i < 32; i += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + i), e.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + i), e.high);
  }
}

// --- moments

// Sixteen float64 accumulators; lane i takes the elements with position % 16 == i on every ISA.
struct D16 {
  __m256d v[4];
};
EPI_INLINE D16 zero_d16() {
  const __m256d z = _mm256_setzero_pd();
  return {{z, z, z, z}};
}
// The square of a float32 is exact in float64: one rounding with the sum or two, the bits are the same.
EPI_INLINE void add_moments(D16& sum, D16& sum_of_squares, const F16& x) {
  const __m256d wide[4] = {
      _mm256_cvtps_pd(_mm256_castps256_ps128(x.a.v)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.a.v, 1)),
      _mm256_cvtps_pd(_mm256_castps256_ps128(x.b.v)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.b.v, 1))};
  for (int i = 0; i < 4; ++i) {
    sum.v[i] = _mm256_add_pd(sum.v[i], wide[i]);
    sum_of_squares.v[i] = _mm256_fmadd_pd(wide[i], wide[i], sum_of_squares.v[i]);
  }
}
EPI_INLINE void store(double* p, const D16& x) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, x.v[i]);
}

}  // namespace epi::EPI_ISA
