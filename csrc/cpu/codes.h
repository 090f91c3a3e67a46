// Codes of exp_avg_sq and importance as bfloat16 words: exactly, since four bits of mantissa are fewer
// than seven. The stages after the step read 8-bit importances through it.

#pragma once

#include "cpu/rows.h"
#include "math/codec.h"

namespace epi::EPI_ISA {

// `codes` starts a block; n of them.
EPI_INLINE void expand(uint16_t* words, const uint8_t* codes, const uint8_t* scales, int64_t n) {
  for (int64_t i = 0; i < n; i += kCodeBlock) {
    const uint32_t scale = scales[i / kCodeBlock];
    // code 255 of a block that is not finite becomes +inf
    const uint32_t base =
        scale == kNonfiniteScale ? kBfloat16Infinity - (255u << 3) : (scale + kLowestExponent - 15) << 7;
    const int64_t count = n - i < kCodeBlock ? n - i : kCodeBlock;
    for (int64_t j = 0; j < count; ++j) {
      const uint16_t code = codes[i + j];
      words[i + j] = code == 0 ? uint16_t{0} : static_cast<uint16_t>((code << 3) + base);
    }
  }
}

// The importances of a row, where they are codes.
struct CodedImportance {
  const uint8_t* codes;
  const uint8_t* scales;

  EPI_INLINE CodedImportance(TableRow row)
      : codes(importances<uint8_t>(row)),
        scales(pointer<const uint8_t>(row, row[kImportance] != 0 ? kImportanceScale : kExpAvgSqScale)) {}

  // Elements start .. start + n - 1 as words; start is a multiple of 64.
  EPI_INLINE void read(uint16_t* words, int64_t start, int64_t n) const {
    expand(words, codes + start, scales + start / kCodeBlock, n);
  }
};

}  // namespace epi::EPI_ISA
