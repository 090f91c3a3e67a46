// Stage 1 where a state is 8-bit: blocks of 64 elements, whose codes are written when the largest of the
// new values is known.
//
// A block takes three short loops: moments, weights, codes. In one loop the chain of decoding, root, division
// and rounding is longer than what a processor looks ahead; and while the weights are computed the largest
// values become known. What is between the loops lies in the first cache.

#pragma once

#include "cpu/codes_memory.h"
#include "cpu/step.h"

namespace epi::EPI_ISA {

// The pair at position `j` of the block: its moments, its importance and what m is divided by.
template <bool kOwn, class P, class S>
EPI_INLINE void moments_of_pair(const StepContext& x, const CodedPointers<P, S>& p,
                                const CodedFactors& factors, int j, NewValues& next, Tops& tops) {
  Pair g = load_pair<true>(p.grad + j);
  if (x.has_multiplier) {
    g = {g.a * x.multiplier, g.b * x.multiplier};
    store_pair<true, false, true>(p.grad + j, g, RandomBits{});
  }
  const Pair g2{g.a * g.a, g.b * g.b};
  const Pair m = load_decoded<true>(p.exp_avg + j, factors.exp_avg);
  const Pair v = load_decoded<false>(p.exp_avg_sq + j, factors.exp_avg_sq);
  const Pair new_m{exp_avg_ema(x.c, m.a, g.a), exp_avg_ema(x.c, m.b, g.b)};
  const Pair new_v{exp_avg_sq_ema(x.c, v.a, g2.a), exp_avg_sq_ema(x.c, v.b, g2.b)};
  store_in_order(next.denom + j, {denominator(x.c, new_v.a), denominator(x.c, new_v.b)});
  store_in_order(next.exp_avg + j, new_m);
  store_in_order(next.exp_avg_sq + j, new_v);
  if constexpr (sizeof(S) == 1) {
    tops.exp_avg = top_of<true>(tops.exp_avg, new_m);
    tops.exp_avg_sq = top_of<false>(tops.exp_avg_sq, new_v);
  }
  if constexpr (kOwn) {
    Pair u{};
    if (p.importance_u8 != nullptr) u = load_decoded<false>(p.importance_u8 + j, factors.importance);
    if (p.importance_f32 != nullptr) u = load_pair<true>(p.importance_f32 + j);
    if (p.importance_bf16 != nullptr) u = load_pair<true>(p.importance_bf16 + j);
    const Pair new_u{importance_ema(x.c, u.a, g2.a), importance_ema(x.c, u.b, g2.b)};
    store_in_order(next.importance + j, new_u);
    tops.importance = top_of<false>(tops.importance, new_u);
  }
}

template <bool kOwn, bool kStochastic, bool kSpecial, class P, class S>
EPI_INLINE void store_floats(const CodedPointers<P, S>& p, int j, uint32_t isolated, const NewValues& next,
                             Pair theta, Pair old_theta, const RandomPair& w0) {
  RandomPair w1{};
  if constexpr (kStochastic && (kOwn || sizeof(S) > 1)) w1 = random_words1(w0);
  if constexpr (sizeof(S) > 1) {
    store_pair<true, kStochastic, kSpecial>(p.exp_avg + j, load_in_order(next.exp_avg + j), high_halves(w0));
    store_pair<true, kStochastic, kSpecial>(p.exp_avg_sq + j, load_in_order(next.exp_avg_sq + j),
                                            low_halves(w1));
  }
  if constexpr (kOwn) {
    const Pair u = load_in_order(next.importance + j);
    if (p.importance_f32 != nullptr) {
      store_pair<true, kStochastic, kSpecial>(p.importance_f32 + j, u, high_halves(w1));
    }
    if (p.importance_bf16 != nullptr) {
      store_pair<true, kStochastic, kSpecial>(p.importance_bf16 + j, u, high_halves(w1));
    }
  }
  store_pair_but<true, kStochastic, kSpecial>(p.param + j, isolated, theta, old_theta, low_halves(w0));
}

// Its weights, and whatever state of it is no code. `isolated`: its mask bits; `key`: see block_key().
template <bool kOwn, bool kStochastic, class P, class S>
EPI_INLINE void weights_of_pair(const StepContext& x, const CodedPointers<P, S>& p, int j, uint32_t isolated,
                                StepU key, NewValues& next) {
  RandomPair w0{};
  if constexpr (kStochastic) {
    w0 = random_words0(key, j);
    next.put_words(j, w0);
  }
  const Pair theta = load_pair<true>(p.param + j);
  const Pair m = load_in_order(next.exp_avg + j), denom = load_in_order(next.denom + j);
  const Pair updated{updated_weight(x.c, theta.a, m.a, denom.a), updated_weight(x.c, theta.b, m.b, denom.b)};
  // as in step_pair(): only float32 values can hand on a NaN that rounding would spoil
  if constexpr (kOwn || sizeof(P) != 2 || sizeof(S) == 4) {
    auto special = unordered(updated.a, updated.b);
    if constexpr (kOwn) {
      const Pair u = load_in_order(next.importance + j);
      special = special | unordered(u.a, u.b);
    }
    if (any(special)) [[unlikely]] {
      return store_floats<kOwn, kStochastic, true>(p, j, isolated, next, updated, theta, w0);
    }
  }
  store_floats<kOwn, kStochastic, false>(p, j, isolated, next, updated, theta, w0);
}

template <bool kOwn, bool kStochastic, class P, class S>
EPI_INLINE void codes_of_pair(const CodedPointers<P, S>& p, int j, const NewValues& next,
                              const Grids& grids) {
  RandomPair w0{}, w1{};
  if constexpr (kStochastic) {
    w0 = next.words(j);
    w1 = random_words1(w0);
  }
  if constexpr (sizeof(S) == 1) {
    encode<kStochastic, true>(p.exp_avg + j, load_in_order(next.exp_avg + j), grids.exp_avg, high_halves(w0));
    encode<kStochastic, false>(p.exp_avg_sq + j, load_in_order(next.exp_avg_sq + j), grids.exp_avg_sq,
                               kOwn ? low_halves(w1) : low_halves_alone(w1));
  }
  if constexpr (kOwn) {
    if (p.importance_u8 != nullptr) {
      encode<kStochastic, false>(p.importance_u8 + j, load_in_order(next.importance + j), grids.importance,
                                 high_halves(w1));
    }
  }
}

// The block that `p` points to.
template <bool kOwn, bool kStochastic, class P, class S>
EPI_INLINE void step_block(const StepContext& x, const CodedPointers<P, S>& p, uint64_t isolated, StepU key) {
  NewValues next;
  const CodedFactors factors = coded_factors<kOwn>(p);
  Tops tops = no_tops();
#pragma GCC unroll 1
  for (int j = 0; j < kCodeBlock; j += kPair) moments_of_pair<kOwn>(x, p, factors, j, next, tops);
  const CodedBlocks blocks = blocks_of(tops);
#pragma GCC unroll 1
  for (int j = 0; j < kCodeBlock; j += kPair) {
    weights_of_pair<kOwn, kStochastic>(x, p, j, static_cast<PairBits>(isolated >> j), key, next);
  }
  const Grids grids = grids_of<kOwn, sizeof(S) == 1>(blocks);
#pragma GCC unroll 1
  for (int j = 0; j < kCodeBlock; j += kPair) codes_of_pair<kOwn, kStochastic>(p, j, next, grids);
  if constexpr (sizeof(S) == 1) {
    write_scale(p.exp_avg, p.exp_avg_scale, blocks.exp_avg);
    write_scale(p.exp_avg_sq, p.exp_avg_sq_scale, blocks.exp_avg_sq);
  }
  if constexpr (kOwn) {
    if (p.importance_u8 != nullptr) write_scale(p.importance_u8, p.importance_scale, blocks.importance);
  }
}

template <class P, class S>
EPI_INLINE void add_stored(StatsSums<F16>& sums, const CodedPointers<P, S>& p, int64_t n, bool moments) {
  if (p.importance_u8 != nullptr) return add_codes(sums, p.importance_u8, p.importance_scale, n, moments);
  if (p.importance_f32 != nullptr) return add_range(sums, p.importance_f32, n, moments);
  if (p.importance_bf16 != nullptr) return add_range(sums, p.importance_bf16, n, moments);
  if constexpr (sizeof(S) == 1) add_codes(sums, p.exp_avg_sq, p.exp_avg_sq_scale, n, moments);
}

template <class P, class S, bool kOwn, bool kStochastic>
void step_coded_range(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  const StepContext x = step_context<true>(row, start, stop, a);
  const uint8_t* mask = pointer<const uint8_t>(row, kIsolationMask);
  const CodedPointers<P, S> pointers = coded_pointers<P, S>(row);
  StatsSums<F16> sums = empty_sums<F16>();
  for (int64_t i = start; i < stop; i += kCodeBlock) {
    const CodedPointers<P, S> p = pointers.template at<kOwn>(i);
    const StepU key = block_key(row, i);
    const int count = stop - i < kCodeBlock ? static_cast<int>(stop - i) : kCodeBlock;
    if (count == kCodeBlock) [[likely]] {
      p.template prefetch<kOwn>();
      step_block<kOwn, kStochastic>(x, p, mask_word<uint64_t>(mask, i), key);
    } else {
      CodedTail<P, S> tail;
      step_block<kOwn, kStochastic>(x, tail.load(p, count), mask_bits<uint64_t>(mask, i, count), key);
      tail.store(p, count, a.has_grad_multiplier);
    }
    if (a.stats != nullptr) add_stored(sums, p, count, a.moments);
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
