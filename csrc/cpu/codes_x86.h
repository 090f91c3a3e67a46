// What the 8-bit codes of a block need of both AVX sets.

#pragma once

#include "math/codec.h"

namespace epi::EPI_ISA {

struct CodeExtrema {
  uint32_t low, high;
};

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
