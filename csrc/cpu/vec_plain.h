// Sixteen lanes in four vectors of 128 bits, the type that GCC and Clang offer on every processor
// (SSE2, NEON), one IEEE rounding an operation as everywhere. GCC takes wider ones apart badly.

#pragma once

#include "cpu/twice.h"
#include "math/scalar.h"
#include "math/score.h"

namespace epi::EPI_ISA {

constexpr int kLanes = 16;
constexpr int kParts = 4;
typedef float F32Part __attribute__((vector_size(16)));
typedef uint32_t U32Part __attribute__((vector_size(16)));
typedef int16_t I16Part __attribute__((vector_size(16)));

struct F16 {
  F32Part v[kParts];
};
struct U16 {
  U32Part v[kParts];
};
struct M16 {
  U32Part v[kParts];  // all ones or zero
};

// A vector of which part q is `expression`. No loop: indices that are constants from the start keep
// the parts in registers, and the compiler quick.
#define EPI_EACH(Result, expression)                                                    \
  do {                                                                                  \
    const auto part = [&](int q) __attribute__((always_inline)) { return expression; }; \
    return Result{{part(0), part(1), part(2), part(3)}};                                \
  } while (false)

template <>
struct Lanes<F16> {
  using U = U16;
  using M = M16;
  static EPI_INLINE F16 f32(float x) { EPI_EACH(F16, (F32Part{x, x, x, x})); }
  static EPI_INLINE U16 u32(uint32_t x) { EPI_EACH(U16, (U32Part{x, x, x, x})); }
  static EPI_INLINE U16 iota(uint32_t first) {
    EPI_EACH(U16, (first + 4 * static_cast<uint32_t>(q) + U32Part{0, 1, 2, 3}));
  }
};

EPI_INLINE F16 operator+(F16 a, F16 b) {
  EPI_EACH(F16, a.v[q] + b.v[q]);
}
EPI_INLINE F16 operator-(F16 a, F16 b) {
  EPI_EACH(F16, a.v[q] - b.v[q]);
}
EPI_INLINE F16 operator*(F16 a, F16 b) {
  EPI_EACH(F16, a.v[q] * b.v[q]);
}
EPI_INLINE F16 operator/(F16 a, F16 b) {
  EPI_EACH(F16, a.v[q] / b.v[q]);
}
EPI_INLINE F32Part sqrt_rn(F32Part a) {
#if defined(__SSE2__)
  return (F32Part)_mm_sqrt_ps((__m128)a);
#elif defined(__aarch64__)
  return (F32Part)vsqrtq_f32((float32x4_t)a);
#else
  return F32Part{sqrtf(a[0]), sqrtf(a[1]), sqrtf(a[2]), sqrtf(a[3])};
#endif
}
EPI_INLINE F16 sqrt_rn(F16 a) {
  EPI_EACH(F16, sqrt_rn(a.v[q]));
}
EPI_INLINE M16 operator>=(F16 a, F16 b) {
  EPI_EACH(M16, (U32Part)(a.v[q] >= b.v[q]));
}
EPI_INLINE M16 operator<(F16 a, F16 b) {
  EPI_EACH(M16, (U32Part)(a.v[q] < b.v[q]));
}
EPI_INLINE M16 operator!=(F16 a, F16 b) {
  EPI_EACH(M16, (U32Part)(a.v[q] != b.v[q]));
}

EPI_INLINE U16 operator+(U16 a, U16 b) {
  EPI_EACH(U16, a.v[q] + b.v[q]);
}
EPI_INLINE U16 operator-(U16 a, U16 b) {
  EPI_EACH(U16, a.v[q] - b.v[q]);
}
EPI_INLINE U16 operator*(U16 a, U16 b) {
  EPI_EACH(U16, a.v[q] * b.v[q]);
}
EPI_INLINE U16 operator&(U16 a, U16 b) {
  EPI_EACH(U16, a.v[q] & b.v[q]);
}
EPI_INLINE U16 operator^(U16 a, U16 b) {
  EPI_EACH(U16, a.v[q] ^ b.v[q]);
}
EPI_INLINE U16 operator>>(U16 a, int count) {
  EPI_EACH(U16, a.v[q] >> count);
}
EPI_INLINE M16 operator==(U16 a, U16 b) {
  EPI_EACH(M16, (U32Part)(a.v[q] == b.v[q]));
}
EPI_INLINE M16 operator!=(U16 a, U16 b) {
  EPI_EACH(M16, (U32Part)(a.v[q] != b.v[q]));
}
EPI_INLINE M16 operator<(U16 a, U16 b) {
  EPI_EACH(M16, (U32Part)(a.v[q] < b.v[q]));
}

EPI_INLINE M16 operator&(M16 a, M16 b) {
  EPI_EACH(M16, a.v[q] & b.v[q]);
}
EPI_INLINE M16 operator|(M16 a, M16 b) {
  EPI_EACH(M16, a.v[q] | b.v[q]);
}
EPI_INLINE M16 operator!(M16 a) {
  EPI_EACH(M16, ~a.v[q]);
}
EPI_INLINE uint32_t to_bits(M16 a) {
  uint32_t bits = 0;
  for (int q = 0; q < kParts; ++q) {
#if defined(__SSE2__)
    bits |= static_cast<uint32_t>(_mm_movemask_ps((__m128)a.v[q])) << 4 * q;
#else
    const U32Part b = a.v[q] & U32Part{1, 2, 4, 8};
    bits |= (b[0] | b[1] | b[2] | b[3]) << 4 * q;
#endif
  }
  return bits;
}
EPI_INLINE bool any(M16 a) {
  const U32Part b = (a.v[0] | a.v[1]) | (a.v[2] | a.v[3]);
#if defined(__SSE2__)
  return _mm_movemask_ps((__m128)b) != 0;
#else
  return (b[0] | b[1] | b[2] | b[3]) != 0;
#endif
}
template <class M>
EPI_INLINE M from_bits(uint32_t bits) {
  EPI_EACH(M, (U32Part)((U32Part{1, 2, 4, 8} & (bits >> 4 * q)) != 0));
}

EPI_INLINE U16 bits_of(F16 a) {
  EPI_EACH(U16, (U32Part)a.v[q]);
}
EPI_INLINE F16 float_of(U16 a) {
  EPI_EACH(F16, (F32Part)a.v[q]);
}
EPI_INLINE U16 select(M16 where, U16 a, U16 b) {
  EPI_EACH(U16, (a.v[q] & where.v[q]) | (b.v[q] & ~where.v[q]));
}
EPI_INLINE F16 select(M16 where, F16 a, F16 b) {
  return float_of(select(where, bits_of(a), bits_of(b)));
}
EPI_INLINE F16 min(F16 a, F16 b) {
  return select(a < b, a, b);
}
EPI_INLINE F16 max(F16 a, F16 b) {
  return select(b < a, a, b);
}

// Part by part: a copy of all sixteen at once goes through the stack.
template <class Part>
EPI_INLINE Part load_part(const void* p, int q) {
  Part part;
  memcpy(&part, static_cast<const char*>(p) + 16 * q, sizeof part);
  return part;
}
template <class V>
EPI_INLINE void store_parts(void* p, const V& x) {
  char* bytes = static_cast<char*>(p);
  memcpy(bytes, &x.v[0], 16);
  memcpy(bytes + 16, &x.v[1], 16);
  memcpy(bytes + 32, &x.v[2], 16);
  memcpy(bytes + 48, &x.v[3], 16);
}
EPI_INLINE U16 load_words(const void* p) {
  EPI_EACH(U16, load_part<U32Part>(p, q));
}

template <class F>
EPI_INLINE F load(const float* p) {
  EPI_EACH(F, load_part<F32Part>(p, q));
}
template <class F>
EPI_INLINE F load(const uint16_t* p) {
  EPI_EACH(F, ((F32Part)(U32Part{p[4 * q], p[4 * q + 1], p[4 * q + 2], p[4 * q + 3]} << 16)));
}
EPI_INLINE void store(float* p, F16 a) {
  store_parts(p, a);
}
EPI_INLINE void store(uint32_t* p, U16 a) {
  store_parts(p, a);
}

using StepF = F16;
constexpr int kStepWidth = 16;
EPI_INLINE U16 kept(U16 x) {
  return x;
}
EPI_INLINE U16 folded_halves(U16 x) {
  return (x ^ (x >> 16)) & Lanes<F16>::u32(0xFFFFu);
}
// Thirty-two elements at once. bfloat16 values lie two to a word (the low half first: every target
// is little-endian): splitting them into the even and the odd elements takes one operation each way
// where widening in order takes more, and no element cares beside which others it is computed.
// Halves in order: 0..15, 16..31; split: 0, 2, .. 30 and 1, 3, .. 31.
using Pair = Twice<F16>;

EPI_INLINE U16 shifted_left(U16 a, int count) {
  EPI_EACH(U16, a.v[q] << count);
}
EPI_INLINE Pair load_in_order(const float* p) {
  return {load<F16>(p), load<F16>(p + kLanes)};
}
EPI_INLINE Pair load_split(const uint16_t* p) {
  const U16 words = load_words(p);
  return {float_of(shifted_left(words, 16)), float_of(words & Lanes<F16>::u32(0xFFFF0000u))};
}
EPI_INLINE Pair load_split(const float* p) {
  float x[2 * kLanes];
  for (int i = 0; i < kLanes; ++i) {
    x[i] = p[2 * i];
    x[kLanes + i] = p[2 * i + 1];
  }
  return {load<F16>(x), load<F16>(x + kLanes)};
}
EPI_INLINE Pair in_order(Pair split) {
  float even[kLanes], odd[kLanes], x[2 * kLanes];
  store(even, split.a);
  store(odd, split.b);
  for (int i = 0; i < kLanes; ++i) {
    x[2 * i] = even[i];
    x[2 * i + 1] = odd[i];
  }
  return {load<F16>(x), load<F16>(x + kLanes)};
}
// The high halves of even and odd words, in order.
EPI_INLINE U16 join_halves(U16 even, U16 odd) {
  EPI_EACH(U16, (even.v[q] >> 16) | (odd.v[q] & 0xFFFF0000u));
}
EPI_INLINE void store_halves(uint16_t* p, U16 even, U16 odd) {
  store_parts(p, join_halves(even, odd));
}
// Lanes of bits 0, 2, .. 30.
EPI_INLINE M16 even_lanes(uint32_t bits) {
  EPI_EACH(M16, (U32Part)((U32Part{1, 4, 16, 64} & (bits >> 8 * q)) != 0));
}
// Elements whose bit in `keep` is set get `old` back, which is what was loaded from there.
EPI_INLINE void store_halves_but(uint16_t* p, uint32_t keep, U16 even, U16 odd, Pair old) {
  store_halves(p, select(even_lanes(keep), bits_of(old.a), even),
               select(even_lanes(keep >> 1), bits_of(old.b), odd));
}
EPI_INLINE void store_but(float* p, uint32_t keep, Pair x, Pair old) {
  store(p, select(from_bits<M16>(keep), old.a, x.a));
  store(p + kLanes, select(from_bits<M16>(keep >> 16), old.b, x.b));
}

// One of the two is no number.
EPI_INLINE M16 unordered(F16 x, F16 y) {
  return (x != x) | (y != y);
}
EPI_INLINE M16 is_finite(F16 x) {
  EPI_EACH(M16, (U32Part)(((U32Part)x.v[q] & 0x7FFFFFFFu) < 0x7F800000u));
}
EPI_INLINE U16 increment(U16 x, M16 where) {
  EPI_EACH(U16, x.v[q] - where.v[q]);
}

// Thirty-two bfloat16 values: a bit each where bound <= word < +inf. For a positive bound the words
// compare as signed integers do; negative values and NaNs of either sign fall outside.
EPI_INLINE uint32_t finite_from(const uint16_t* p, int bound) {
  const int16_t least = static_cast<int16_t>(bound), end = static_cast<int16_t>(kBfloat16Infinity);
  uint32_t bits = 0;
  for (int q = 0; q < kParts; ++q) {
    const I16Part words = load_part<I16Part>(p, q);
    const I16Part in = (I16Part)((words >= least) & (words < end));
#if defined(__SSE2__)
    const int packed = _mm_movemask_epi8(_mm_packs_epi16((__m128i)in, _mm_setzero_si128()));
    bits |= static_cast<uint32_t>(packed) << 8 * q;
#else
    for (int i = 0; i < 8; ++i) bits |= static_cast<uint32_t>(in[i] & 1) << (8 * q + i);
#endif
  }
  return bits;
}
// The same with a bound by old bit.
EPI_INLINE uint32_t finite_from(const uint16_t* p, const int bound[2], uint32_t old) {
  const uint32_t in = finite_from(p, bound[0]);
  return old == 0 ? in : (finite_from(p, bound[1]) & old) | (in & ~old);
}

// Extrema of finite words in the order of the numbers they are.
struct WordExtrema {
  I16Part low, high;
};
EPI_INLINE WordExtrema no_words() {
  const I16Part zero{};
  return {zero + int16_t{0x7FFF}, zero - int16_t{0x7FFF} - int16_t{1}};
}
// Adds thirty-two words; how many of them are finite.
EPI_INLINE int add_words(WordExtrema& e, const uint16_t* p) {
  I16Part count{};
  for (int q = 0; q < kParts; ++q) {
    const I16Part words = load_part<I16Part>(p, q);
    const I16Part finite = (I16Part)((words & 0x7FFF) < static_cast<int16_t>(kBfloat16Infinity));
    const I16Part ordered = words ^ ((words >> 15) & 0x7FFF);
    const I16Part below = finite & (I16Part)(ordered < e.low), above = finite & (I16Part)(ordered > e.high);
    e.low = (ordered & below) | (e.low & ~below);
    e.high = (ordered & above) | (e.high & ~above);
    count -= finite;
  }
  int n = 0;
  for (int i = 0; i < 8; ++i) n += count[i];
  return n;
}
EPI_INLINE void store(int16_t* low, int16_t* high, const WordExtrema& e) {  // [32] each
  for (int i = 0; i < 32; i += 8) {
    memcpy(low + i, &e.low, sizeof e.low);
    memcpy(high + i, &e.high, sizeof e.high);
  }
}

// Sixteen float64 accumulators; lane i takes the elements with position % 16 == i on every ISA.
struct D16 {
  double v[kLanes];
};
EPI_INLINE D16 zero_d16() {
  return {};
}
EPI_INLINE void add_moments(D16& sum, D16& sum_of_squares, F16 x) {
  float values[kLanes];
  store(values, x);
  for (int i = 0; i < kLanes; ++i) {
    const double wide = values[i];
    sum.v[i] += wide;
    sum_of_squares.v[i] += wide * wide;
  }
}
EPI_INLINE void store(double* p, D16 x) {
  memcpy(p, &x, sizeof x);
}

#undef EPI_EACH

}  // namespace epi::EPI_ISA
