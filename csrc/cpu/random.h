// Random words of a range's elements, from their logical indices.

#pragma once

#include "cpu/step_memory.h"

namespace epi::EPI_ISA {

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
EPI_INLINE PairU positions(int64_t k) {
  return {load_words(kPositions.of + k), load_words(kPositions.of + k + kStepWidth)};
}

using PairWord = RandomWord<PairU>;

// The logical index of the range's element i is first + i; in a shard of several runs of neighbours, what
// table.py says of them.
struct RandomKeys {
  uint64_t first;
  uint32_t key, key_after_wrap;  // for indices with the first one's high word, and with the next
  uint32_t rng_key;
  uint64_t run, stride;    // of a shard in several runs; run is 0 otherwise
  uint64_t offset, start;  // the row's, the range's

  EPI_INLINE uint64_t index(int64_t i) const { return first + static_cast<uint64_t>(i); }
  EPI_INLINE uint32_t key_of(uint64_t index) const {
    return index >> 32 == first >> 32 ? key : key_after_wrap;
  }

  // Of 2^k elements that start at a multiple of 2^k, k at most 16, the indices differ in the lowest bits
  // alone, which the mixer's first step lets through. It is taken here, once for all of them.
  EPI_INLINE StepU folded(int64_t i) const {
    const uint32_t low = static_cast<uint32_t>(index(i)) ^ key_of(index(i));
    return Lanes<StepF>::u32(low ^ (low >> 16));
  }

  // First words of the pair of elements from i on, a multiple of kPair. kAligned: `first` is one too.
  EPI_INLINE bool aligned() const { return run == 0 && first % kPair == 0; }
  EPI_INLINE bool blocks_aligned() const { return run == 0 && first % kCodeBlock == 0; }
  template <bool kAligned>
  EPI_INLINE PairWord word0(int64_t i) const {
    if constexpr (kAligned) {
      return {mix_folded<Pair>(twice(folded(i)) ^ positions(0))};
    } else if (run != 0) {
      return scattered_word0(i);
    } else {
      const PairU low = Lanes<Pair>::u32(static_cast<uint32_t>(index(i))), index_low = low + positions(0);
      const PairU key_here = Lanes<Pair>::u32(key_of(index(i)));
      return random_word0<Pair>(select(index_low < low, Lanes<Pair>::u32(key_after_wrap), key_here),
                                index_low);
    }
  }

  // Element by element.
  __attribute__((noinline)) PairWord scattered_word0(int64_t i) const {
    uint32_t low[kPair], keys[kPair];
    uint64_t line = (start + static_cast<uint64_t>(i)) / run, rest = (start + static_cast<uint64_t>(i)) % run;
    uint64_t high = 0;
    uint32_t key_of_high = mix<float>(rng_key);
    for (int k = 0; k < kPair; ++k) {
      const uint64_t at = offset + line * stride + rest;
      if (at >> 32 != high) {
        high = at >> 32;
        key_of_high = mix<float>(rng_key ^ static_cast<uint32_t>(high));
      }
      low[k] = static_cast<uint32_t>(at);
      keys[k] = key_of_high;
      if (++rest == run) ++line, rest = 0;
    }
    alignas(64) uint32_t low_lanes[kPair], key_lanes[kPair];
    for (int k = 0; k < kPair; ++k) {
      low_lanes[k] = low[kPositions.of[k]];
      key_lanes[k] = keys[kPositions.of[k]];
    }
    return random_word0<Pair>({load_words(key_lanes), load_words(key_lanes + kStepWidth)},
                              {load_words(low_lanes), load_words(low_lanes + kStepWidth)});
  }
};
EPI_INLINE RandomKeys random_keys(TableRow row, int64_t start) {
  const uint64_t first = static_cast<uint64_t>(row[kIndexOffset] + start);
  const uint32_t key = static_cast<uint32_t>(row[kRngKey]), high = static_cast<uint32_t>(first >> 32);
  return {first,
          mix<float>(key ^ high),
          mix<float>(key ^ (high + 1)),
          key,
          static_cast<uint64_t>(row[kIndexRun]),
          static_cast<uint64_t>(row[kIndexStride]),
          static_cast<uint64_t>(row[kIndexOffset]),
          static_cast<uint64_t>(start)};
}

EPI_INLINE PairU low_half(PairU word) {
  return word & Lanes<Pair>::u32(0xFFFFu);
}

}  // namespace epi::EPI_ISA
