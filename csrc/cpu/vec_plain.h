// Sixteen lanes in the vector type that GCC and Clang offer on every processor; they lower it to
// whatever the target has (SSE2, NEON), one IEEE rounding an operation as everywhere.

#pragma once

#include "math/scalar.h"
#include "math/score.h"

namespace epi::EPI_ISA {

constexpr int kLanes = 16;
typedef float F32Lanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32Lanes __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16Lanes __attribute__((vector_size(2 * kLanes)));
typedef double F64Lanes __attribute__((vector_size(8 * kLanes)));

struct F16 {
  F32Lanes v;
};
struct U16 {
  U32Lanes v;
};
struct M16 {
  U32Lanes v;  // all ones or zero
};

template <>
struct Lanes<F16> {
  using U = U16;
  using M = M16;
  static EPI_INLINE F16 f32(float x) { return {x - F32Lanes{}}; }
  static EPI_INLINE U16 u32(uint32_t x) { return {x - U32Lanes{}}; }
  static EPI_INLINE U16 iota(uint32_t first) {
    return {first + U32Lanes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};
  }
};

EPI_INLINE F16 operator+(F16 a, F16 b) {
  return {a.v + b.v};
}
EPI_INLINE F16 operator-(F16 a, F16 b) {
  return {a.v - b.v};
}
EPI_INLINE F16 operator*(F16 a, F16 b) {
  return {a.v * b.v};
}
EPI_INLINE F16 operator/(F16 a, F16 b) {
  return {a.v / b.v};
}
EPI_INLINE F16 sqrt_rn(F16 a) {
  F16 r = a;
  for (int i = 0; i < kLanes; ++i) r.v[i] = sqrtf(a.v[i]);
  return r;
}
EPI_INLINE M16 operator>=(F16 a, F16 b) {
  return {(U32Lanes)(a.v >= b.v)};
}
EPI_INLINE M16 operator<(F16 a, F16 b) {
  return {(U32Lanes)(a.v < b.v)};
}
EPI_INLINE M16 operator!=(F16 a, F16 b) {
  return {(U32Lanes)(a.v != b.v)};
}

EPI_INLINE U16 operator+(U16 a, U16 b) {
  return {a.v + b.v};
}
EPI_INLINE U16 operator-(U16 a, U16 b) {
  return {a.v - b.v};
}
EPI_INLINE U16 operator*(U16 a, U16 b) {
  return {a.v * b.v};
}
EPI_INLINE U16 operator&(U16 a, U16 b) {
  return {a.v & b.v};
}
EPI_INLINE U16 operator^(U16 a, U16 b) {
  return {a.v ^ b.v};
}
EPI_INLINE U16 operator>>(U16 a, int count) {
  return {a.v >> count};
}
EPI_INLINE M16 operator==(U16 a, U16 b) {
  return {(U32Lanes)(a.v == b.v)};
}
EPI_INLINE M16 operator!=(U16 a, U16 b) {
  return {(U32Lanes)(a.v != b.v)};
}
EPI_INLINE M16 operator<(U16 a, U16 b) {
  return {(U32Lanes)(a.v < b.v)};
}

EPI_INLINE M16 operator&(M16 a, M16 b) {
  return {a.v & b.v};
}
EPI_INLINE M16 operator|(M16 a, M16 b) {
  return {a.v | b.v};
}
EPI_INLINE M16 operator!(M16 a) {
  return {~a.v};
}
EPI_INLINE uint32_t to_bits(M16 a) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= a.v[i] & (1u << i);
  return bits;
}
EPI_INLINE bool any(M16 a) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= a.v[i];
  return bits != 0;
}
template <class M>
EPI_INLINE M from_bits(uint32_t bits) {
  const U32Lanes lane{1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                      1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  return {(U32Lanes)((lane & bits) != 0)};
}

EPI_INLINE U16 bits_of(F16 a) {
  return {(U32Lanes)a.v};
}
EPI_INLINE F16 float_of(U16 a) {
  return {(F32Lanes)a.v};
}
EPI_INLINE U16 select(M16 where, U16 a, U16 b) {
  return {(a.v & where.v) | (b.v & ~where.v)};
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

template <class F>
EPI_INLINE F load(const float* p) {
  F r;
  memcpy(&r, p, sizeof r);
  return r;
}
template <class F>
EPI_INLINE F load(const uint16_t* p) {
  U16Lanes half;
  memcpy(&half, p, sizeof half);
  return float_of(U16{__builtin_convertvector(half, U32Lanes) << 16});
}
EPI_INLINE void store(float* p, F16 a) {
  memcpy(p, &a, sizeof a);
}
EPI_INLINE void store(uint32_t* p, U16 a) {
  memcpy(p, &a, sizeof a);
}
// Thirty-two elements at once. bfloat16 values lie two to a word (the low half first: every target
// is little-endian): splitting them into the even and the odd elements takes one operation each way
// where widening in order takes more, and no element cares beside which others it is computed.
struct Pair {
  F16 a, b;  // in order: 0..15, 16..31; split: 0, 2, .. 30 and 1, 3, .. 31
};

EPI_INLINE Pair load_split(const uint16_t* p) {
  U16 words;
  memcpy(&words, p, sizeof words);
  return {float_of(U16{words.v << 16}), float_of(U16{words.v & 0xFFFF0000u})};
}
EPI_INLINE Pair load_split(const float* p) {
  Pair r{};
  for (int i = 0; i < kLanes; ++i) {
    r.a.v[i] = p[2 * i];
    r.b.v[i] = p[2 * i + 1];
  }
  return r;
}
EPI_INLINE Pair in_order(Pair split) {
  float x[2 * kLanes];
  for (int i = 0; i < kLanes; ++i) {
    x[2 * i] = split.a.v[i];
    x[2 * i + 1] = split.b.v[i];
  }
  return {load<F16>(x), load<F16>(x + kLanes)};
}
// The high halves of even and odd words, in order.
EPI_INLINE void store_halves(uint16_t* p, U16 even, U16 odd) {
  const U32Lanes words = (even.v >> 16) | (odd.v & 0xFFFF0000u);
  memcpy(p, &words, sizeof words);
}
// Lanes of bits 0, 2, .. 30.
EPI_INLINE M16 even_lanes(uint32_t bits) {
  const U32Lanes lane{1 << 0,  1 << 2,  1 << 4,  1 << 6,  1 << 8,  1 << 10, 1 << 12, 1 << 14,
                      1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28, 1 << 30};
  return {(U32Lanes)((lane & bits) != 0)};
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
  return {(U32Lanes)((bits_of(x).v & 0x7FFFFFFFu) < 0x7F800000u)};
}
EPI_INLINE U16 increment(U16 x, M16 where) {
  return {x.v - where.v};
}

// Thirty-two bfloat16 values: a bit each where bound <= word < +inf. For a positive bound the words
// compare as signed integers do; negative values and NaNs of either sign fall outside.
EPI_INLINE uint32_t finite_from(const uint16_t* p, int bound) {
  uint32_t bits = 0;
  for (int i = 0; i < 2 * kLanes; ++i) {
    bits |= static_cast<uint32_t>(p[i] >= bound && p[i] < kBfloat16Infinity) << i;
  }
  return bits;
}

// Sixteen float64 accumulators; lane i takes the elements with position % 16 == i on every ISA.
struct D16 {
  F64Lanes v;
};
EPI_INLINE D16 zero_d16() {
  return {F64Lanes{}};
}
EPI_INLINE void add_moments(D16& sum, D16& sum_of_squares, F16 x) {
  const F64Lanes wide = __builtin_convertvector(x.v, F64Lanes);
  sum.v += wide;
  sum_of_squares.v += wide * wide;
}
EPI_INLINE void store(double* p, D16 x) {
  memcpy(p, &x, sizeof x);
}

}  // namespace epi::EPI_ISA
