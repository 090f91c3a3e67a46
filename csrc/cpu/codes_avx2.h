// 8-bit codes (math/codec.h) in AVX2 registers.

#pragma once

#include "cpu/codes_x86.h"
#include "cpu/vec_avx2.h"

namespace epi::EPI_ISA {

EPI_INLINE U8 max_signed(U8 x, U8 y) {
  return {_mm256_max_epi32(x.v, y.v)};
}
EPI_INLINE U8 max_unsigned(U8 x, U8 y) {
  return {_mm256_max_epu32(x.v, y.v)};
}
EPI_INLINE U8 where_positive(U8 x, U8 sign) {
  return {_mm256_sign_epi32(x.v, sign.v)};
}
EPI_INLINE F8 add_exact_product(F8 x, F8 y, F8 z) {
  return {_mm256_fmadd_ps(x.v, y.v, z.v)};
}
EPI_INLINE uint32_t largest(U8 x) {
  __m128i most = _mm_max_epu32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4E));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(most, _mm_shuffle_epi32(most, 0xB1))));
}

// half_of_code(), by the processor's own conversion: eight codes, moved to where a binary16 has them.
EPI_INLINE F8 halves(__m128i words) {
  return {_mm256_cvtph_ps(words)};
}

// Sixteen codes as halves, the even and the odd elements apart.
template <bool kSigned>
EPI_INLINE Pair load_codes(const uint8_t* p) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if constexpr (kSigned) {  // the sign stays where it is and the rest moves down past two bits, cleared then
    const __m128i bits = _mm_set1_epi16(static_cast<short>(0x9FC0));
    const __m128i even = _mm_srai_epi16(_mm_slli_epi16(codes, 8), 2), odd = _mm_srai_epi16(codes, 2);
    return {halves(_mm_and_si128(even, bits)), halves(_mm_and_si128(odd, bits))};
  } else {  // beside each code four times its share below kFine: 64 of the one and 112 of the other
    const __m128i low = _mm_set1_epi16(0xFF), times = _mm_set1_epi16(112 << 8 | 64);
    const __m128i coarse = _mm_slli_epi16(_mm_min_epu8(codes, _mm_set1_epi8(kFine)), 2);
    const __m128i even = _mm_or_si128(_mm_and_si128(low, codes), _mm_slli_epi16(coarse, 8));
    const __m128i odd = _mm_or_si128(_mm_srli_epi16(codes, 8), _mm_andnot_si128(low, coarse));
    return {halves(_mm_maddubs_epi16(even, times)), halves(_mm_maddubs_epi16(odd, times))};
  }
}
// Sixteen unsigned codes as halves, in order.
template <class F>
EPI_INLINE F load_codes_in_order(const uint8_t* p) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i words = half_words(_mm256_cvtepu8_epi16(codes));
  return twice(halves(_mm256_castsi256_si128(words)), halves(_mm256_extracti128_si256(words, 1)));
}

EPI_INLINE void store_bytes(uint8_t* p, __m256i words) {
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
// Codes lie in the low bytes of the words' high halves.
EPI_INLINE void store_codes(uint8_t* p, U8 even, U8 odd) {
  store_bytes(p, join_halves(even, odd).v);
}
EPI_INLINE void store_codes_signed(uint8_t* p, U8 even, U8 odd, Pair x) {
  const __m256i codes = _mm256_and_si256(join_halves(even, odd).v, _mm256_set1_epi16(0x7F));
  const __m256i signs = _mm256_srli_epi16(join_halves(bits_of(x.a), bits_of(x.b)).v, 15);
  store_bytes(p, _mm256_or_si256(codes, _mm256_slli_epi16(signs, 7)));
}

// 4-bit codes (math/nibbles.h): of sixteen elements, the even and the odd ones apart.
EPI_INLINE Lanes<Pair>::U load_nibbles(const uint8_t* p) {
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return {{_mm256_and_si256(bytes, _mm256_set1_epi32(15))}, {_mm256_srli_epi32(bytes, 4)}};
}
EPI_INLINE void store_nibbles(uint8_t* p, U8 even, U8 odd) {
  const __m256i bytes = _mm256_or_si256(even.v, _mm256_slli_epi32(odd.v, 4));
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
EPI_INLINE F8 lookup(const float (&table)[16], U8 index) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index.v);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index.v);
  return {_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index.v, 28)))};
}

// A bit each of a block's codes that are at least `bound`, at most 255.
EPI_INLINE uint32_t codes_from_half(const uint8_t* p, int bound) {
  const __m256i codes = load_words(p).v;
  const __m256i larger = _mm256_max_epu8(codes, _mm256_set1_epi8(static_cast<char>(bound)));
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(larger, codes)));
}
EPI_INLINE uint64_t codes_from(const uint8_t* p, int bound) {
  return codes_from_half(p, bound) | static_cast<uint64_t>(codes_from_half(p + 32, bound)) << 32;
}

}  // namespace epi::EPI_ISA
