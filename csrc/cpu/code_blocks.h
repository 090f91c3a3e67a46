// Importances that are codes, a block of 64 at a time: what the stages of a refresh ask of a block, whatever
// its codes are.

#pragma once

#include "cpu/rows.h"
#include "math/codec.h"
#include "math/nibbles.h"

namespace epi::EPI_ISA {

constexpr float kLevels[16] = {EPI_LEVELS};

// A block's codes as bytes, in order; `count` of them exist, and are followed by zeros.
struct ByteBlock {
  const uint8_t* codes;
  Block<false> block;

  EPI_INLINE bool finite() const { return block.finite; }
  EPI_INLINE float value(uint32_t code) const {
    return half_of_code<float>(evenly_spaced<float>(code << 19)) * block.factor();
  }
  // kWidth of them, from `j` on.
  template <class F>
  EPI_INLINE F values(int j) const {
    return load_codes_in_order<F>(codes + j) * Lanes<F>::f32(block.factor());
  }
  // A bit each of those whose value is finite and at least `bound`.
  EPI_INLINE uint64_t from(float bound) const {
    const int least = code_bound(block, bound);
    return block.finite && least < 256 ? codes_from(codes, least) : 0;
  }
};
struct ByteCodes {
  const uint8_t* codes;
  const uint8_t* scales;

  EPI_INLINE const void* address(int64_t i) const { return codes + i; }
  EPI_INLINE ByteBlock block(int64_t i, int count, uint8_t (&space)[kCodeBlock]) const {
    const uint8_t* at = count == kCodeBlock ? codes + i : padded(space, codes + i, count);
    return {at, epi::EPI_ISA::Block<false>::of_scale(scales[i / kCodeBlock])};
  }
};

struct NibbleBlock {
  const uint8_t* codes;
  float scale;

  EPI_INLINE bool finite() const { return scale < float_of(kInfiniteScale); }
  EPI_INLINE float value(uint32_t code) const { return kLevels[code] * scale; }
  template <class F>
  EPI_INLINE F values(int j) const {
    float found[kWidth];
    for (int i = 0; i < kWidth; ++i) found[i] = value(codes[j + i]);
    return load<F>(found);
  }
  EPI_INLINE uint64_t from(float bound) const {
    if (!finite()) return 0;
    int least = 0;
    for (const float level : kLevels) least += level * scale < bound ? 1 : 0;
    return least < 16 ? codes_from(codes, least) : 0;
  }
};
struct NibbleCodes {
  const uint8_t* codes;  // packed
  const uint16_t* scales;

  EPI_INLINE const void* address(int64_t i) const { return codes + i / 2; }
  EPI_INLINE NibbleBlock block(int64_t i, int count, uint8_t (&space)[kCodeBlock]) const {
    uint8_t packed[kCodeBlock / 2];
    const uint8_t* at = codes + i / 2;
    if (count < kCodeBlock) at = padded(packed, at, (count + 1) / 2);
    for (int j = 0; j < kCodeBlock / 2; ++j) {
      space[2 * j] = at[j] & 15;
      space[2 * j + 1] = at[j] >> 4;
    }
    return {space, float_of(static_cast<uint32_t>(scales[i / kCodeBlock]) << 16)};
  }
};

// u of a row whose importances are codes of the one kind or the other.
EPI_INLINE ByteCodes byte_codes(TableRow row) {
  return {importances<uint8_t>(row), importance_scales(row)};
}
EPI_INLINE NibbleCodes nibble_codes(TableRow row) {
  return {pointer<const uint8_t>(row, kExpAvgSq), pointer<const uint16_t>(row, kExpAvgSqScale)};
}

}  // namespace epi::EPI_ISA
