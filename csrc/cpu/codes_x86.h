// What the 8-bit codes of a block need of both AVX sets.

#pragma once

#include "math/codec.h"

namespace epi::EPI_ISA {

struct CodeExtrema {
  uint32_t low, high;
};

// Sixteen unsigned codes -> the words of binary16 that half_of_code() takes.
EPI_INLINE __m256i half_words(__m256i codes) {
  const __m256i coarse = _mm256_min_epu16(codes, _mm256_set1_epi16(kFine));
  return _mm256_add_epi16(_mm256_slli_epi16(codes, 6), _mm256_mullo_epi16(coarse, _mm256_set1_epi16(7 << 6)));
}

// The smallest of sixteen bytes: of each pair first, then of the words that holds.
EPI_INLINE uint32_t smallest_byte(__m128i bytes) {
  const __m128i pairs = _mm_min_epu8(bytes, _mm_srli_epi16(bytes, 8));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(pairs))) & 0xFFFFu;
}

// Of a whole block's codes.
EPI_INLINE CodeExtrema code_extrema(const uint8_t* p) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32));
  const __m256i low = _mm256_min_epu8(a, b), high = _mm256_max_epu8(a, b);
  const __m128i lowest = _mm_min_epu8(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  const __m128i highest = _mm_max_epu8(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  return {smallest_byte(lowest), 255 - smallest_byte(_mm_xor_si128(highest, _mm_set1_epi8(-1)))};
}

}  // namespace epi::EPI_ISA
