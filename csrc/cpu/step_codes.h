// Stage 1 where a state is 8-bit: blocks of 64 elements, whose codes are written when the largest of the
// new values is known.
//
// kBlock elements at a time take three loops: moments, codes, weights. In one loop the chain of decoding,
// root, division and rounding is longer than what a processor looks ahead, and the codes wait for the largest
// value. Roots are taken beside the codes, which leave the divider alone. What is between the loops lies in
// the first cache.

#pragma once

#include "cpu/codes_memory.h"
#include "cpu/step.h"

namespace epi::EPI_ISA {

// The pair of elements from `i` on, whose new values lie at position `k`: its moments and its importance.
template <bool kOwn, bool kStochastic, class P, class S>
EPI_INLINE void moments_of_pair(const StepContext& x, const CodedPointers<P, S>& p,
                                const CodedFactors& factors, int64_t i, int k, StepU key, NewValues& next,
                                Tops& tops) {
  if constexpr (kStochastic) next.put_words(k, random_words0(key, k % kCodeBlock));
  Pair g = load_pair<true>(p.grad + i);
  if (x.has_multiplier) {
    g = {g.a * x.multiplier, g.b * x.multiplier};
    store_pair<true, false, true>(p.grad + i, g, RandomBits{});
  }
  const Pair g2{g.a * g.a, g.b * g.b};
  const Pair m = load_decoded<true>(p.exp_avg + i, factors.exp_avg);
  const Pair v = load_decoded<false>(p.exp_avg_sq + i, factors.exp_avg_sq);
  const Pair new_m{exp_avg_ema(x.c, m.a, g.a), exp_avg_ema(x.c, m.b, g.b)};
  const Pair new_v{exp_avg_sq_ema(x.c, v.a, g2.a), exp_avg_sq_ema(x.c, v.b, g2.b)};
  store_in_order(next.exp_avg + k, new_m);
  store_in_order(next.exp_avg_sq + k, new_v);
  if constexpr (sizeof(S) == 1) {
    tops.exp_avg = top_of<true>(tops.exp_avg, new_m);
    tops.exp_avg_sq = top_of<false>(tops.exp_avg_sq, new_v);
  }
  if constexpr (kOwn) {
    Pair u{};
    if (p.importance_u8 != nullptr) u = load_decoded<false>(p.importance_u8 + i, factors.importance);
    if (p.importance_f32 != nullptr) u = load_pair<true>(p.importance_f32 + i);
    if (p.importance_bf16 != nullptr) u = load_pair<true>(p.importance_bf16 + i);
    const Pair new_u{importance_ema(x.c, u.a, g2.a), importance_ema(x.c, u.b, g2.b)};
    store_in_order(next.importance + k, new_u);
    tops.importance = top_of<false>(tops.importance, new_u);
  }
}

// Writes a state that is codes, or floats.
template <bool kSigned, bool kStochastic, bool kSpecial, class T>
EPI_INLINE void store_state(T* p, Pair x, const Grid<StepF>& grid, RandomBits random) {
  if constexpr (sizeof(T) == 1) {
    encode<kStochastic, kSigned>(p, x, grid, random);
  } else {
    store_pair<true, kStochastic, kSpecial>(p, x, random);
  }
}

template <bool kOwn, bool kStochastic, bool kSpecial, class P, class S>
EPI_INLINE void store_states(const CodedPointers<P, S>& p, int64_t i, const Grids& grids, Pair m, Pair v,
                             Pair u, const RandomPair& w0) {
  const RandomPair w1 = kStochastic ? random_words1(w0) : RandomPair{};
  store_state<true, kStochastic, kSpecial>(p.exp_avg + i, m, grids.exp_avg, high_halves(w0));
  store_state<false, kStochastic, kSpecial>(p.exp_avg_sq + i, v, grids.exp_avg_sq,
                                            kOwn ? low_halves(w1) : low_halves_alone(w1));
  if constexpr (kOwn) {
    const auto store = [&](auto* importance) __attribute__((always_inline)) {
      if (importance == nullptr) return;
      store_state<false, kStochastic, kSpecial>(importance + i, u, grids.importance, high_halves(w1));
    };
    store(p.importance_u8), store(p.importance_f32), store(p.importance_bf16);
  }
}

// Its states in memory, and what m is divided by.
template <bool kOwn, bool kStochastic, class P, class S>
EPI_INLINE void states_of_pair(const StepContext& x, const CodedPointers<P, S>& p, int64_t i, int k,
                               const Grids& grids, NewValues& next) {
  const RandomPair w0 = kStochastic ? next.words(k) : RandomPair{};
  const Pair m = load_in_order(next.exp_avg + k), v = load_in_order(next.exp_avg_sq + k);
  const Pair u = kOwn ? load_in_order(next.importance + k) : Pair{};
  store_in_order(next.denom + k, {denominator(x.c, v.a), denominator(x.c, v.b)});
  // as in step_pair(): only float32 values can hand on a NaN that rounding would spoil
  if constexpr (kOwn || sizeof(S) > 1) {
    auto special = unordered(m.a, m.b) | unordered(v.a, v.b);
    if constexpr (kOwn) special = special | unordered(u.a, u.b);
    if (any(special)) [[unlikely]] {
      return store_states<kOwn, kStochastic, true>(p, i, grids, m, v, u, w0);
    }
  }
  store_states<kOwn, kStochastic, false>(p, i, grids, m, v, u, w0);
}

// Its weights. `isolated`: their mask bits.
template <bool kStochastic, class P, class S>
EPI_INLINE void weights_of_pair(const StepContext& x, const CodedPointers<P, S>& p, int64_t i, int k,
                                uint32_t isolated, const NewValues& next) {
  const Pair theta = load_pair<true>(p.param + i);
  const Pair m = load_in_order(next.exp_avg + k), denom = load_in_order(next.denom + k);
  const Pair updated{updated_weight(x.c, theta.a, m.a, denom.a), updated_weight(x.c, theta.b, m.b, denom.b)};
  const RandomBits random = kStochastic ? low_halves(next.words(k)) : RandomBits{};
  if constexpr (sizeof(P) == 2 && sizeof(S) == 4) {
    if (any(unordered(updated.a, updated.b))) [[unlikely]] {
      return store_pair_but<true, kStochastic, true>(p.param + i, isolated, updated, theta, random);
    }
  }
  store_pair_but<true, kStochastic, false>(p.param + i, isolated, updated, theta, random);
}

// The elements from `i` on, `n` of them, whole blocks. `mask`: their packed bits; `key_of(i)`: see BlockKeys.
template <bool kOwn, bool kStochastic, class P, class S, class KeyOf>
EPI_INLINE void step_blocks(const StepContext& x, const CodedPointers<P, S>& p, int64_t i, int n,
                            const uint8_t* mask, const KeyOf& key_of, NewValues& next) {
  for (int b = 0; b < n; b += kCodeBlock) {
    p.template prefetch<kOwn>(i + b);
    const int64_t block = (i + b) >> 6;
    const CodedFactors factors = coded_factors<kOwn>(p, block);
    const StepU key = key_of(i + b);
    Tops tops = no_tops();
#pragma GCC unroll 1
    for (int k = b; k < b + kCodeBlock; k += kPair) {
      moments_of_pair<kOwn, kStochastic>(x, p, factors, i + k, k, key, next, tops);
    }
    next.tops[b / kCodeBlock] = tops;
  }
  for (int b = 0; b < n; b += kCodeBlock) write_scales<kOwn>(p, (i + b) >> 6, next.tops[b / kCodeBlock]);
  for (int b = 0; b < n; b += kCodeBlock) {
    const int64_t block = (i + b) >> 6;
    const Grids grids = grids_of<kOwn>(p, block);
#pragma GCC unroll 1
    for (int k = b; k < b + kCodeBlock; k += kPair) {
      states_of_pair<kOwn, kStochastic>(x, p, i + k, k, grids, next);
    }
    mark_nonfinite<kOwn>(p, block);
  }
#pragma GCC unroll 1
  for (int k = 0; k < n; k += kPair) {
    weights_of_pair<kStochastic>(x, p, i + k, k, mask_word<PairBits>(mask, i + k), next);
  }
}

template <class P, class S>
EPI_INLINE void add_stored(StatsSums<F16>& sums, const CodedPointers<P, S>& p, int64_t i, int64_t n,
                           bool moments) {
  const int64_t block = i / kCodeBlock;
  if (p.importance_u8 != nullptr) {
    add_codes(sums, p.importance_u8 + i, p.importance_scale + block, n, moments);
  } else if (p.importance_f32 != nullptr) {
    add_range(sums, p.importance_f32 + i, n, moments);
  } else if (p.importance_bf16 != nullptr) {
    add_range(sums, p.importance_bf16 + i, n, moments);
  } else if constexpr (sizeof(S) == 1) {
    add_codes(sums, p.exp_avg_sq + i, p.exp_avg_sq_scale + block, n, moments);
  }
}

template <class P, class S, bool kOwn, bool kStochastic>
void step_coded_range(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  const StepContext x = step_context<true>(row, start, stop, a);
  const uint8_t* mask = pointer<const uint8_t>(row, kIsolationMask);
  const CodedPointers<P, S> p = coded_pointers<P, S>(row);
  StatsSums<F16> sums = empty_sums<F16>();
  NewValues next;
  const BlockKeys keys = block_keys(row, start);
  for (int64_t i = start; i < stop; i += kBlock) {
    const int n = stop - i < kBlock ? static_cast<int>(stop - i) : kBlock;
    const int whole = n / kCodeBlock * kCodeBlock;
    const auto key_of = [&](int64_t at) __attribute__((always_inline)) { return keys.of(at - start); };
    step_blocks<kOwn, kStochastic>(x, p, i, whole, mask, key_of, next);
    if (whole < n) [[unlikely]] {
      const int64_t at = i + whole;
      CodedTail<P, S> tail;
      const uint64_t isolated = mask_bits<uint64_t>(mask, at, n - whole);
      const auto key_of_tail = [&](int64_t) __attribute__((always_inline)) { return keys.of(at - start); };
      step_blocks<kOwn, kStochastic>(x, tail.load(p, at, n - whole), 0, kCodeBlock,
                                     reinterpret_cast<const uint8_t*>(&isolated), key_of_tail, next);
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
