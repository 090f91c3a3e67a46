// 8-bit codes (math/codec.h) in vectors of 128 bits.

#pragma once

#include "cpu/vec_plain.h"
#include "math/codec.h"

namespace epi::EPI_ISA {

#define EPI_EACH(Result, expression)                                                    \
  do {                                                                                  \
    const auto part = [&](int q) __attribute__((always_inline)) { return expression; }; \
    return Result{{part(0), part(1), part(2), part(3)}};                                \
  } while (false)

EPI_INLINE U16 max_signed(U16 x, U16 y) {
  typedef int32_t I32Part __attribute__((vector_size(16)));
  const auto less = [&](int q) __attribute__((always_inline)) {
    return (U32Part)((I32Part)x.v[q] < (I32Part)y.v[q]);
  };
  EPI_EACH(U16, (y.v[q] & less(q)) | (x.v[q] & ~less(q)));
}
EPI_INLINE U16 max_unsigned(U16 x, U16 y) {
  return select(x < y, y, x);
}
EPI_INLINE U16 where_positive(U16 x, U16 sign) {
  EPI_EACH(U16, x.v[q] & (U32Part)(sign.v[q] != 0));
}
EPI_INLINE F16 add_exact_product(F16 x, F16 y, F16 z) {
  return x * y + z;
}
EPI_INLINE uint32_t largest(U16 x) {
  uint32_t words[kLanes], most = 0;
  store(words, x);
  for (const uint32_t word : words) most = word > most ? word : most;
  return most;
}

// Sixteen codes as halves.
template <bool kSigned>
EPI_INLINE F16 halves(U16 codes) {
  using L = Lanes<F16>;
  const U16 code19 = shifted_left(codes & L::u32(kSigned ? 0x7Fu : 0xFFu), 19);
  if constexpr (!kSigned) return half_of_code<F16>(evenly_spaced<F16>(code19));
  return float_of(bits_of(half_of_code<F16>(code19)) ^ shifted_left(codes & L::u32(0x80u), 24));
}
template <class T>
EPI_INLINE U16 widened(const T* p) {
  EPI_EACH(U16, (U32Part{p[4 * q], p[4 * q + 1], p[4 * q + 2], p[4 * q + 3]}));
}
#undef EPI_EACH

// Thirty-two codes as halves, the even and the odd elements apart.
template <bool kSigned>
EPI_INLINE Pair load_codes(const uint8_t* p) {
  uint16_t two[kLanes];
  memcpy(two, p, sizeof two);
  const U16 codes = widened(two);
  return {halves<kSigned>(codes), halves<kSigned>(codes >> 8)};
}
// Sixteen unsigned codes as halves, in order.
template <class F>
EPI_INLINE F load_codes_in_order(const uint8_t* p) {
  return halves<false>(widened(p));
}

// Two bytes a word, in its low half.
EPI_INLINE void store_bytes(uint8_t* p, U16 words) {
  uint32_t wide[kLanes];
  uint16_t two[kLanes];
  store(wide, words);
  for (int i = 0; i < kLanes; ++i) two[i] = static_cast<uint16_t>(wide[i]);
  memcpy(p, two, sizeof two);
}
// Codes lie in the low bytes of the words' high halves.
EPI_INLINE U16 joined_codes(U16 even, U16 odd) {
  using L = Lanes<F16>;
  return ((even >> 16) & L::u32(0xFFu)) + ((odd >> 8) & L::u32(0xFF00u));
}
EPI_INLINE void store_codes(uint8_t* p, U16 even, U16 odd) {
  store_bytes(p, joined_codes(even, odd));
}
EPI_INLINE void store_codes_signed(uint8_t* p, U16 even, U16 odd, Pair x) {
  using L = Lanes<F16>;
  const U16 signs = ((bits_of(x.a) >> 24) & L::u32(0x80u)) + ((bits_of(x.b) >> 16) & L::u32(0x8000u));
  store_bytes(p, joined_codes(even, odd) ^ signs);
}

// 4-bit codes (math/nibbles.h): of thirty-two elements, the even and the odd ones apart.
EPI_INLINE Lanes<Pair>::U load_nibbles(const uint8_t* p) {
  const U16 bytes = widened(p);
  return {bytes & Lanes<F16>::u32(15), bytes >> 4};
}
EPI_INLINE void store_nibbles(uint8_t* p, U16 even, U16 odd) {
  uint32_t low[kLanes], high[kLanes];
  store(low, even);
  store(high, odd);
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(low[i] | high[i] << 4);
}
EPI_INLINE F16 lookup(const float (&table)[16], U16 index) {
  uint32_t at[kLanes];
  float found[kLanes];
  store(at, index);
  for (int i = 0; i < kLanes; ++i) found[i] = table[at[i]];
  return load<F16>(found);
}

struct CodeExtrema {
  uint32_t low, high;
};
// Of a whole block's codes.
EPI_INLINE CodeExtrema code_extrema(const uint8_t* p) {
  typedef uint8_t U8Part __attribute__((vector_size(16)));
  U8Part low = load_part<U8Part>(p, 0), high = low;
  for (int q = 1; q < kCodeBlock / 16; ++q) {
    const U8Part codes = load_part<U8Part>(p, q);
    const U8Part below = (U8Part)(codes < low), above = (U8Part)(codes > high);
    low = (codes & below) | (low & ~below);
    high = (codes & above) | (high & ~above);
  }
  CodeExtrema e{low[0], high[0]};
  for (int i = 1; i < 16; ++i) {
    e.low = low[i] < e.low ? low[i] : e.low;
    e.high = high[i] > e.high ? high[i] : e.high;
  }
  return e;
}

// A bit each of a block's codes that are at least `bound`, at most 255.
EPI_INLINE uint64_t codes_from(const uint8_t* p, int bound) {
  typedef uint8_t U8Part __attribute__((vector_size(16)));
  uint64_t bits = 0;
  for (int q = 0; q < kCodeBlock / 16; ++q) {
    const U8Part in = (U8Part)(load_part<U8Part>(p, q) >= static_cast<uint8_t>(bound));
#if defined(__SSE2__)
    bits |= static_cast<uint64_t>(_mm_movemask_epi8((__m128i)in)) << 16 * q;
#else
    for (int i = 0; i < 16; ++i) bits |= static_cast<uint64_t>(in[i] & 1) << (16 * q + i);
#endif
  }
  return bits;
}

}  // namespace epi::EPI_ISA
