// The streams of a step with 8-bit states, a block of 64 elements at a time, and the codes of a block.

#pragma once

#include "cpu/step_memory.h"
#include "math/codec.h"

namespace epi::EPI_ISA {

// A pair, split, whose halves go side by side.
using CodeF = Twice<StepF>;
using CodeU = Twice<StepU>;
EPI_INLINE CodeF side_by_side(Pair x) {
  return {x.a, x.b};
}
EPI_INLINE Pair pair(CodeF x) {
  return {x.a, x.b};
}

// Where a block's tensors lie. S: uint8_t where the moments are codes. At most one of the importances is
// there.
template <class P, class S>
struct CodedPointers : StepPointers<P, S> {
  uint8_t* importance_u8;
  uint8_t* exp_avg_scale;
  uint8_t* exp_avg_sq_scale;
  uint8_t* importance_scale;

  // What comes after the block that starts at element i.
  template <bool kOwn>
  EPI_INLINE void prefetch(int64_t i) const {
    StepPointers<P, S>::template prefetch<kOwn, kCodeBlock>(i);
    if (kOwn && importance_u8 != nullptr) this->template ahead<kCodeBlock>(importance_u8 + i);
  }
};

template <class P, class S>
EPI_INLINE CodedPointers<P, S> coded_pointers(TableRow row) {
  const bool own = (row[kFlags] & kImportanceInt8) != 0;
  return {step_pointers<P, S>(row), own ? pointer<uint8_t>(row, kImportance) : nullptr,
          pointer<uint8_t>(row, kExpAvgScale), pointer<uint8_t>(row, kExpAvgSqScale),
          pointer<uint8_t>(row, kImportanceScale)};
}

// The last, incomplete block. Zeros stay zeros, and no block's largest value is one of them.
template <class P, class S>
struct CodedTail {
  StepTail<P, S, kCodeBlock> tensors;
  uint8_t importance_u8[kCodeBlock] = {};

  CodedPointers<P, S> load(const CodedPointers<P, S>& p, int64_t i, int count) {
    const int64_t block = i / kCodeBlock;
    CodedPointers<P, S> here{tensors.load(p, i, count), nullptr, p.exp_avg_scale + block,
                             p.exp_avg_sq_scale + block, p.importance_scale + block};
    if (p.importance_u8 != nullptr) copy(here.importance_u8 = importance_u8, p.importance_u8 + i, count);
    return here;
  }
  void store(const CodedPointers<P, S>& p, int64_t i, int count, bool with_grad) const {
    tensors.store(p, i, count, with_grad);
    if (p.importance_u8 != nullptr) copy(p.importance_u8 + i, importance_u8, count);
  }
};

// What the halves of a block's codes are multiplied by.
struct CodedFactors {
  CodeF exp_avg, exp_avg_sq, importance;
};
template <bool kSigned>
EPI_INLINE CodeF factor_of(const uint8_t* scale) {
  return Lanes<CodeF>::f32(Block<kSigned>::of_scale(*scale).factor());
}
template <bool kOwn, class P, class S>
EPI_INLINE CodedFactors coded_factors(const CodedPointers<P, S>& p, int64_t block) {
  CodedFactors f{};
  if constexpr (sizeof(S) == 1) {
    f.exp_avg = factor_of<true>(p.exp_avg_scale + block);
    f.exp_avg_sq = factor_of<false>(p.exp_avg_sq_scale + block);
  }
  if constexpr (kOwn) {
    if (p.importance_u8 != nullptr) f.importance = factor_of<false>(p.importance_scale + block);
  }
  return f;
}

// A pair of a state's values, codes or not.
template <bool kSigned, class T>
EPI_INLINE CodeF load_decoded(const T* p, CodeF factor) {
  if constexpr (sizeof(T) == 1) {
    return side_by_side(load_codes<kSigned>(p)) * factor;
  } else {
    return side_by_side(load_pair<true>(p));
  }
}

// A pair of values in a buffer.
EPI_INLINE void put(float* p, CodeF x) {
  store(p, x.a);
  store(p + kStepWidth, x.b);
}
EPI_INLINE CodeF get(const float* p) {
  return side_by_side(load_in_order(p));
}

// Random words of blocks. A block starts at a multiple of 64, so an element's index differs from the first in
// the lowest six bits alone, which the mixer's first step lets through: one exclusive or an element is left.
struct BlockKeys {
  uint64_t first;  // the range's first index
  uint32_t key, key_after_wrap;

  EPI_INLINE StepU of(int64_t i) const {
    const uint64_t index = first + static_cast<uint64_t>(i);
    const uint32_t low = static_cast<uint32_t>(index) ^ (index >> 32 == first >> 32 ? key : key_after_wrap);
    return Lanes<StepF>::u32(low ^ (low >> 16));
  }
};
EPI_INLINE BlockKeys block_keys(TableRow row, int64_t start) {
  const uint64_t first = static_cast<uint64_t>(row[kIndexOffset] + start);
  const uint32_t key = static_cast<uint32_t>(row[kRngKey]), high = static_cast<uint32_t>(first >> 32);
  return {first, mix<float>(key ^ high), mix<float>(key ^ (high + 1))};
}
// Positions in a block: of the even elements of each pair, and of the odd ones.
struct Positions {
  alignas(64) uint32_t of[kCodeBlock];
  constexpr Positions() : of() {
    for (uint32_t i = 0; i < kCodeBlock; ++i) {
      const uint32_t lane = i % kStepWidth, odd = i / kStepWidth % 2;
      of[i] = i / kPair * kPair + 2 * lane + odd;
    }
  }
};
constexpr Positions kPositions;

using CodeWord = RandomWord<CodeU>;
EPI_INLINE CodeWord code_word0(StepU key, int64_t j) {
  const uint32_t* p = kPositions.of + j;
  return {mix_folded<CodeF>(twice(key) ^ twice(load_words(p), load_words(p + kStepWidth)))};
}
EPI_INLINE CodeWord code_word1(const CodeWord& w0) {
  return random_word1<CodeF>(w0.word(), Lanes<CodeF>::u32(kGolden));
}
EPI_INLINE CodeU low_half(const CodeWord& w) {
  return w.word() & Lanes<CodeF>::u32(0xFFFFu);
}
EPI_INLINE RandomBits random_bits(CodeU x) {
  return {x.a, x.b};
}

// The largest values of a block as words, lane by lane.
struct Tops {
  StepU exp_avg, exp_avg_sq, importance;
};
// What is computed of some blocks before their codes are written: pairs, split.
struct NewValues {
  alignas(64) float exp_avg[kBlock];
  alignas(64) float exp_avg_sq[kBlock];
  alignas(64) float importance[kBlock];
  alignas(64) float denom[kBlock];
  alignas(64) float random[kBlock];  // the first words of random bits
  Tops tops[kBlock / kCodeBlock];
};

EPI_INLINE Tops no_tops() {
  const StepU zero = Lanes<StepF>::u32(0);
  return {zero, zero, zero};
}
template <bool kSigned>
EPI_INLINE StepU top_of(StepU top, CodeF x) {
  CodeU word = bits_of(x);
  if constexpr (kSigned) word = word & Lanes<CodeF>::u32(kMagnitude);  // else only a NaN has a sign
  return max_unsigned(top, max_unsigned(word.a, word.b));
}

struct Grids {
  Grid<CodeF> exp_avg, exp_avg_sq, importance;
};
template <bool kOwn, class P, class S>
EPI_INLINE Grids grids_of(const CodedPointers<P, S>& p, int64_t block) {
  Grids g{};
  if constexpr (sizeof(S) == 1) {
    g.exp_avg = grid<CodeF>(Block<true>::of_scale(p.exp_avg_scale[block]));
    g.exp_avg_sq = grid<CodeF>(Block<false>::of_scale(p.exp_avg_sq_scale[block]));
  }
  if constexpr (kOwn) {
    if (p.importance_u8 != nullptr) {
      g.importance = grid<CodeF>(Block<false>::of_scale(p.importance_scale[block]));
    }
  }
  return g;
}

// Writes the codes of a pair, for a block that is finite.
template <bool kStochastic, bool kSigned>
EPI_INLINE void encode(uint8_t* codes, CodeF x, const Grid<CodeF>& g, CodeU random) {
  const CodeU r = kStochastic ? random : Lanes<CodeF>::u32(kNearest);
  if constexpr (kSigned) {
    const CodeU word = code_word_signed(x, g) + r;
    store_codes_signed(codes, word.a, word.b, pair(x));
  } else {
    const CodeU word = code_word_unsigned(x, g) + r;
    store_codes(codes, word.a, word.b);
  }
}

template <bool kSigned>
EPI_INLINE void write_scale(uint8_t* scale, StepU top) {
  *scale = static_cast<uint8_t>(Block<kSigned>::of_values(largest(top) & kMagnitude).scale());
}
template <bool kOwn, class P, class S>
EPI_INLINE void write_scales(const CodedPointers<P, S>& p, int64_t block, const Tops& tops) {
  if constexpr (sizeof(S) == 1) {
    write_scale<true>(p.exp_avg_scale + block, tops.exp_avg);
    write_scale<false>(p.exp_avg_sq_scale + block, tops.exp_avg_sq);
  }
  if constexpr (kOwn) {
    if (p.importance_u8 != nullptr) write_scale<false>(p.importance_scale + block, tops.importance);
  }
}

// The codes of a block that proved not to be finite.
template <bool kSigned>
EPI_INLINE void mark(uint8_t* codes, uint8_t scale) {
  if (scale == kNonfiniteScale) [[unlikely]]
    memset(codes, kNonfiniteCode<kSigned>, kCodeBlock);
}
template <bool kOwn, class P, class S>
EPI_INLINE void mark_nonfinite(const CodedPointers<P, S>& p, int64_t block) {
  const int64_t i = block * kCodeBlock;
  if constexpr (sizeof(S) == 1) {
    mark<true>(p.exp_avg + i, p.exp_avg_scale[block]);
    mark<false>(p.exp_avg_sq + i, p.exp_avg_sq_scale[block]);
  }
  if constexpr (kOwn) {
    if (p.importance_u8 != nullptr) mark<false>(p.importance_u8 + i, p.importance_scale[block]);
  }
}

}  // namespace epi::EPI_ISA
