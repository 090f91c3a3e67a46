// Stage 1 where a state is 8-bit: blocks of 64 elements, whose codes are written when the largest of the
// new values is known.
//
// kBlock elements at a time take three loops: moments, codes, weights. In one loop the chain of decoding,
// root, division and rounding is longer than what a processor looks ahead, and the codes wait for the largest
// value. Roots are taken beside the codes, which leave the divider alone. What is between the loops lies in
// the first cache.

#pragma once

#include "cpu/codes_memory.h"

namespace epi::EPI_ISA {

// Wherever a shard begins in the whole tensor.
__attribute__((noinline)) inline PairWord word0_of_any(const RandomKeys& keys, int64_t at) {
  return keys.template word0<false>(at);
}

// The pair of elements from `i` on, whose new values lie at position `k`: its moments, its importance and its
// first random words. `key`: RandomKeys::folded() of its block, where its indices start at a multiple of 64;
// `at`: the pair's first element in the range.
template <bool kOwn, bool kStochastic, class P, class S>
EPI_INLINE void moments_of_pair(const StepContext& x, const CodedPointers<P, S>& p,
                                const CodedFactors& factors, int64_t i, int64_t k, StepU key, int64_t at,
                                NewValues& next, Tops& tops) {
  const Pair g = load_grad<true>(x, p.grad + i), g2 = g * g;
  const Pair m = exp_avg_ema(x.c, load_decoded<true>(p.exp_avg + i, factors.exp_avg), g);
  const Pair v = exp_avg_sq_ema(x.c, load_decoded<false>(p.exp_avg_sq + i, factors.exp_avg_sq), g2);
  put(next.exp_avg + k, m);
  put(next.exp_avg_sq + k, v);
  if constexpr (sizeof(S) == 1) {
    tops.exp_avg = top_of<true>(tops.exp_avg, m);
    tops.exp_avg_sq = top_of<false>(tops.exp_avg_sq, v);
  }
  if constexpr (kOwn) {
    Pair u{};
    if (p.importance_u8 != nullptr) u = load_decoded<false>(p.importance_u8 + i, factors.importance);
    if (p.importance_f32 != nullptr) u = load_pair<true>(p.importance_f32 + i);
    if (p.importance_bf16 != nullptr) u = load_pair<true>(p.importance_bf16 + i);
    u = importance_ema(x.c, u, g2);
    put(next.importance + k, u);
    tops.importance = top_of<false>(tops.importance, u);
  }
  if constexpr (kStochastic) {
    PairWord w0{mix_folded<Pair>(twice(key) ^ positions(k % kCodeBlock))};
    if (!x.keys.blocks_aligned()) [[unlikely]]
      w0 = word0_of_any(x.keys, at);
    put(next.random + k, float_of(w0.word()));
  }
}

// Writes a state that is codes, or floats.
template <bool kSigned, bool kStochastic, bool kSpecial, class T>
EPI_INLINE void store_state(T* p, Pair x, const Grid<Pair>& grid, PairU random) {
  if constexpr (sizeof(T) == 1) {
    encode<kStochastic, kSigned>(p, x, grid, random);
  } else {
    store_pair<true, kStochastic, kSpecial>(p, x, random);
  }
}

template <bool kOwn, bool kStochastic, bool kSpecial, class P, class S>
EPI_INLINE void store_states(const CodedPointers<P, S>& p, int64_t i, const Grids& grids, Pair m, Pair v,
                             Pair u, PairU word0) {
  const PairWord w1 = kStochastic ? random_word1<Pair>(word0, Lanes<Pair>::u32(kGolden)) : PairWord{};
  store_state<true, kStochastic, kSpecial>(p.exp_avg + i, m, grids.exp_avg, word0 >> 16);
  store_state<false, kStochastic, kSpecial>(p.exp_avg_sq + i, v, grids.exp_avg_sq,
                                            kOwn ? low_half(w1.word()) : folded_halves(w1.mixed));
  if constexpr (kOwn) {
    const auto store = [&](auto* importance) __attribute__((always_inline)) {
      if (importance == nullptr) return;
      store_state<false, kStochastic, kSpecial>(importance + i, u, grids.importance, w1.high());
    };
    store(p.importance_u8), store(p.importance_f32), store(p.importance_bf16);
  }
}

// Its states in memory, and what m is divided by.
template <bool kOwn, bool kStochastic, class P, class S>
EPI_INLINE void states_of_pair(const StepContext& x, const CodedPointers<P, S>& p, int64_t i, int64_t k,
                               const Grids& grids, NewValues& next) {
  const PairU word0 = kStochastic ? bits_of(load_in_order(next.random + k)) : PairU{};
  const Pair m = load_in_order(next.exp_avg + k), v = load_in_order(next.exp_avg_sq + k);
  const Pair u = kOwn ? load_in_order(next.importance + k) : Pair{};
  put(next.denom + k, denominator(x.c, v));
  // as in moments_of_pair() of floats: only float32 values can hand on a NaN that rounding would spoil
  if constexpr (kOwn || sizeof(S) > 1) {
    auto special = unordered(m.a, m.b) | unordered(v.a, v.b);
    if constexpr (kOwn) special = special | unordered(u.a, u.b);
    if (any(special)) [[unlikely]] {
      return store_states<kOwn, kStochastic, true>(p, i, grids, m, v, u, word0);
    }
  }
  store_states<kOwn, kStochastic, false>(p, i, grids, m, v, u, word0);
}

// The elements from `i` on, `n` of them, whole blocks. `mask`: their packed bits; `at`: the first one
// in the range.
template <bool kOwn, bool kStochastic, class P, class S>
EPI_INLINE void step_blocks(const StepContext& x, const CodedPointers<P, S>& p, int64_t i, int n,
                            const uint8_t* mask, int64_t at, NewValues& next) {
  for (int64_t b = 0; b < n; b += kCodeBlock) {
    p.template prefetch<kOwn>(i + b);
    const int64_t block = (i + b) >> 6;
    const CodedFactors factors = coded_factors<kOwn>(p, block);
    const StepU key = x.keys.folded(at + b);
    Tops tops = no_tops();
#pragma GCC unroll 1
    for (int64_t k = b; k < b + kCodeBlock; k += kPair) {
      moments_of_pair<kOwn, kStochastic>(x, p, factors, i + k, k, key, at + k, next, tops);
    }
    next.tops[b / kCodeBlock] = tops;
  }
  for (int64_t b = 0; b < n; b += kCodeBlock) write_scales<kOwn>(p, (i + b) >> 6, next.tops[b / kCodeBlock]);
  for (int64_t b = 0; b < n; b += kCodeBlock) {
    const int64_t block = (i + b) >> 6;
    const Grids grids = grids_of<kOwn>(p, block);
#pragma GCC unroll 1
    for (int64_t k = b; k < b + kCodeBlock; k += kPair) {
      states_of_pair<kOwn, kStochastic>(x, p, i + k, k, grids, next);
    }
    mark_nonfinite<kOwn>(p, block);
  }
  weights_of_pairs<kStochastic, S>(x, p, i, n, mask, next);
}

template <class P, class S>
EPI_INLINE void add_stored(StatsSums<F16>& sums, const CodedPointers<P, S>& p, int64_t i, int64_t n,
                           bool moments) {
  if (p.importance_u8 != nullptr) {
    add_codes(sums, ByteCodes{p.importance_u8, p.importance_scale}, i, i + n, moments);
  } else if (p.importance_f32 != nullptr) {
    add_range(sums, p.importance_f32 + i, n, moments);
  } else if (p.importance_bf16 != nullptr) {
    add_range(sums, p.importance_bf16 + i, n, moments);
  } else if constexpr (sizeof(S) == 1) {
    add_codes(sums, ByteCodes{p.exp_avg_sq, p.exp_avg_sq_scale}, i, i + n, moments);
  }
}

template <class P, class S, bool kOwn, bool kStochastic>
void step_coded_range(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  const StepContext x = step_context(row, start, a);
  const uint8_t* mask = pointer<const uint8_t>(row, kIsolationMask);
  const CodedPointers<P, S> p = coded_pointers<P, S>(row);
  StatsSums<F16> sums = empty_sums<F16>();
  NewValues next;
  for (int64_t i = start; i < stop; i += kBlock) {
    const int n = stop - i < kBlock ? static_cast<int>(stop - i) : kBlock;
    const int whole = n / kCodeBlock * kCodeBlock;
    step_blocks<kOwn, kStochastic>(x, p, i, whole, mask, i - start, next);
    if (whole < n) [[unlikely]] {
      const int64_t at = i + whole;
      CodedTail<P, S> tail;
      const uint64_t isolated = mask_bits<uint64_t>(mask, at, n - whole);
      step_blocks<kOwn, kStochastic>(x, tail.load(p, at, n - whole), 0, kCodeBlock,
                                     reinterpret_cast<const uint8_t*>(&isolated), at - start, next);
      tail.store(p, at, n - whole, a.has_grad_multiplier);
    }
    if (a.stats != nullptr) add_stored(sums, p, i, n, a.moments);
  }
  if (a.stats != nullptr) *a.stats = reduce(sums);
}

template <class P, class S, bool kOwn>
void step_coded(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  a.stochastic_rounding ? step_coded_range<P, S, kOwn, true>(row, start, stop, a)
                        : step_coded_range<P, S, kOwn, false>(row, start, stop, a);
}

template <class P>
void step_codes_of(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  if ((row[kFlags] & kStateInt8) != 0) {
    row[kImportance] != 0 ? step_coded<P, uint8_t, true>(row, start, stop, a)
                          : step_coded<P, uint8_t, false>(row, start, stop, a);
  } else {
    (row[kFlags] & kStateBf16) != 0 ? step_coded<P, uint16_t, true>(row, start, stop, a)
                                    : step_coded<P, float, true>(row, start, stop, a);
  }
}

inline void step_codes(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  (row[kFlags] & kParamBf16) != 0 ? step_codes_of<uint16_t>(row, start, stop, a)
                                  : step_codes_of<float>(row, start, stop, a);
}

}  // namespace epi::EPI_ISA
