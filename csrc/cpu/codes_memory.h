// The streams of a step with 8-bit states, a block of 64 elements at a time, and the codes of a block.

#pragma once

#include "cpu/step.h"
#include "math/codec.h"

namespace epi::EPI_ISA {

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
    if (kOwn && importance_u8 != nullptr) ahead<kCodeBlock>(importance_u8 + i);
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
  Pair exp_avg, exp_avg_sq, importance;
};
template <bool kSigned>
EPI_INLINE Pair factor_of(const uint8_t* scale) {
  return Lanes<Pair>::f32(Block<kSigned>::of_scale(*scale).factor());
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
EPI_INLINE Pair load_decoded(const T* p, Pair factor) {
  if constexpr (sizeof(T) == 1) {
    return load_codes<kSigned>(p) * factor;
  } else {
    return load_pair<true>(p);
  }
}

// The largest values of a block as words, lane by lane.
struct Tops {
  StepU exp_avg, exp_avg_sq, importance;
};
struct NewValues : NewMoments {
  alignas(64) float exp_avg_sq[kBlock];
  alignas(64) float importance[kBlock];
  Tops tops[kBlock / kCodeBlock];
};

EPI_INLINE Tops no_tops() {
  const StepU zero = Lanes<StepF>::u32(0);
  return {zero, zero, zero};
}
template <bool kSigned>
EPI_INLINE StepU top_of(StepU top, Pair x) {
  PairU word = bits_of(x);
  if constexpr (kSigned) word = word & Lanes<Pair>::u32(kMagnitude);  // else only a NaN has a sign
  return max_unsigned(top, max_unsigned(word.a, word.b));
}

struct Grids {
  Grid<Pair> exp_avg, exp_avg_sq, importance;
};
template <bool kOwn, class P, class S>
EPI_INLINE Grids grids_of(const CodedPointers<P, S>& p, int64_t block) {
  Grids g{};
  if constexpr (sizeof(S) == 1) {
    g.exp_avg = grid<Pair>(Block<true>::of_scale(p.exp_avg_scale[block]));
    g.exp_avg_sq = grid<Pair>(Block<false>::of_scale(p.exp_avg_sq_scale[block]));
  }
  if constexpr (kOwn) {
    if (p.importance_u8 != nullptr) {
      g.importance = grid<Pair>(Block<false>::of_scale(p.importance_scale[block]));
    }
  }
  return g;
}

// Writes the codes of a pair, for a block that is finite.
template <bool kStochastic, bool kSigned>
EPI_INLINE void encode(uint8_t* codes, Pair x, const Grid<Pair>& g, PairU random) {
  const PairU r = kStochastic ? random : Lanes<Pair>::u32(kNearest);
  if constexpr (kSigned) {
    const PairU word = code_word_signed(x, g) + r;
    store_codes_signed(codes, word.a, word.b, x);
  } else {
    const PairU word = code_word_unsigned(x, g) + r;
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
