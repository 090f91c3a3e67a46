// 8-bit codes (math/codec.h) in AVX-512 registers.

#pragma once

#include "cpu/codes_x86.h"
#include "cpu/vec_avx512.h"

namespace epi::EPI_ISA {

EPI_INLINE U16 max_signed(U16 x, U16 y) {
  return {_mm512_max_epi32(x.v, y.v)};
}
EPI_INLINE U16 max_unsigned(U16 x, U16 y) {
  return {_mm512_max_epu32(x.v, y.v)};
}
EPI_INLINE U16 load_words(const void* p) {
  return {_mm512_loadu_si512(p)};
}
EPI_INLINE U16 where_positive(U16 x, U16 sign) {
  return {_mm512_maskz_mov_epi32(_mm512_test_epi32_mask(sign.v, sign.v), x.v)};
}
EPI_INLINE F16 add_exact_product(F16 x, F16 y, F16 z) {
  return {_mm512_fmadd_ps(x.v, y.v, z.v)};
}
EPI_INLINE uint32_t largest(U16 x) {
  return static_cast<uint32_t>(_mm512_reduce_max_epu32(x.v));
}

// Thirty-two codes as halves, the even and the odd elements apart: half_of_code(), by the processor's
// own conversion.
template <bool kSigned>
EPI_INLINE Pair load_codes(const uint8_t* p) {
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if constexpr (kSigned) {  // the sign stays where it is and the rest moves down past two bits, cleared then
    const __m256i bits = _mm256_set1_epi16(static_cast<short>(0x9FC0));
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 2);
    const __m256i odd = _mm256_srai_epi16(codes, 2);
    return {{_mm512_cvtph_ps(_mm256_and_si256(even, bits))}, {_mm512_cvtph_ps(_mm256_and_si256(odd, bits))}};
  } else {  // beside each code four times its share below kFine: 64 of the one and 112 of the other
    const __m256i low = _mm256_set1_epi16(0xFF), times = _mm256_set1_epi16(112 << 8 | 64);
    const __m256i coarse = _mm256_slli_epi16(_mm256_min_epu8(codes, _mm256_set1_epi8(kFine)), 2);
    const __m256i even = _mm256_or_si256(_mm256_and_si256(low, codes), _mm256_slli_epi16(coarse, 8));
    const __m256i odd = _mm256_or_si256(_mm256_srli_epi16(codes, 8), _mm256_andnot_si256(low, coarse));
    return {{_mm512_cvtph_ps(_mm256_maddubs_epi16(even, times))},
            {_mm512_cvtph_ps(_mm256_maddubs_epi16(odd, times))}};
  }
}
// Sixteen unsigned codes as halves, in order.
template <class F>
EPI_INLINE F load_codes_in_order(const uint8_t* p) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtph_ps(half_words(_mm256_cvtepu8_epi16(codes)))};
}

// Codes lie in the low bytes of the words' high halves.
EPI_INLINE void store_bytes(uint8_t* p, __m512i words) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi16_epi8(words));
}
EPI_INLINE void store_codes(uint8_t* p, U16 even, U16 odd) {
  store_bytes(p, join_halves(even, odd));
}
EPI_INLINE void store_codes_signed(uint8_t* p, U16 even, U16 odd, Pair x) {
  const __m512i signs = _mm512_srli_epi16(join_halves(bits_of(x.a), bits_of(x.b)), 15);
  store_bytes(p, _mm512_or_si512(join_halves(even, odd), _mm512_slli_epi16(signs, 7)));
}

// 4-bit codes (math/nibbles.h): of thirty-two elements, the even and the odd ones apart.
EPI_INLINE Lanes<Pair>::U load_nibbles(const uint8_t* p) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {{_mm512_and_si512(bytes, _mm512_set1_epi32(15))}, {_mm512_srli_epi32(bytes, 4)}};
}
EPI_INLINE void store_nibbles(uint8_t* p, U16 even, U16 odd) {
  const __m512i bytes = _mm512_or_si512(even.v, _mm512_slli_epi32(odd.v, 4));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(bytes));
}
EPI_INLINE F16 lookup(const float (&table)[16], U16 index) {
  return {_mm512_permutexvar_ps(index.v, _mm512_loadu_ps(table))};
}

// A bit each of a block's codes that are at least `bound`, at most 255.
EPI_INLINE uint64_t codes_from(const uint8_t* p, int bound) {
  return _mm512_cmpge_epu8_mask(_mm512_loadu_si512(p), _mm512_set1_epi8(static_cast<char>(bound)));
}

}  // namespace epi::EPI_ISA
