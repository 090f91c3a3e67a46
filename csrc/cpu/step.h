// Stage 1, step: the masked update over a range of one parameter whose states are floats.

#pragma once

#include "cpu/rows.h"
#include "cpu/stats.h"
#include "cpu/step_memory.h"
#include "math/adamw.h"
#include "math/rounding.h"

namespace epi::EPI_ISA {

struct StepContext {
  StepConstants<StepF> c;
  StepF multiplier;
  bool has_multiplier;
  // random bits: the logical index of the range's element i is first + i; its low word may wrap
  uint32_t first_low;
  bool wraps;
  StepU key, key_after_wrap;
  StepU to_second, pace, golden;  // constants of the random words
};

template <bool kSplit>
EPI_INLINE StepContext step_context(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  using L = Lanes<StepF>;
  const uint64_t first = static_cast<uint64_t>(row[kIndexOffset] + start);
  const uint32_t key = static_cast<uint32_t>(row[kRngKey]);
  const uint32_t high = static_cast<uint32_t>(first >> 32);
  const uint64_t last = first + static_cast<uint64_t>(stop - start - 1);
  StepContext x{step_constants<StepF>(a.scalars),
                L::f32(a.grad_multiplier),
                a.has_grad_multiplier,
                static_cast<uint32_t>(first),
                last >> 32 != first >> 32,
                L::u32(mix<float>(key ^ high)),
                L::u32(mix<float>(key ^ (high + 1))),
                kept(L::u32(kSplit ? 1 : kStepWidth)),
                kept(L::u32(kPair)),
                kept(L::u32(kGolden))};
  // c * (-g) == (-c) * g to the bit, and g * g never sees the sign
  if ((row[kFlags] & kMaximize) != 0) x.c.one_minus_beta1 = L::f32(-a.scalars[1]);
  return x;
}

// Low words of the logical indices of a range's first Pair: 0, 2, ... of its elements in `a`, the next
// ones in `b` (kSplit), or the first half and the second. They advance by kPair.
template <bool kSplit>
EPI_INLINE StepU first_indices(const StepContext& x) {
  const StepU lane = Lanes<StepF>::iota(0);
  return (kSplit ? lane + lane : lane) + Lanes<StepF>::u32(x.first_low);
}

EPI_INLINE RandomWord<StepU> random_word0_of(const StepContext& x, StepU index_low) {
  StepU key = x.key;
  if (x.wraps) [[unlikely]] {
    key = select(index_low < Lanes<StepF>::u32(x.first_low), x.key_after_wrap, x.key);
  }
  return random_word0<StepF>(key, index_low);
}

struct StepValues {
  Pair theta, old_theta, exp_avg, exp_avg_sq, importance;
};

template <bool kOwn, bool kSplit, bool kStochastic, bool kSpecial, class P, class S>
EPI_INLINE void store_step(const StepPointers<P, S>& p, int64_t i, uint32_t isolated, const StepValues& next,
                           const RandomPair& w0, const RandomPair& w1) {
  store_pair<kSplit, kStochastic, kSpecial>(p.exp_avg + i, next.exp_avg, high_halves(w0));
  store_pair<kSplit, kStochastic, kSpecial>(p.exp_avg_sq + i, next.exp_avg_sq,
                                            kOwn ? low_halves(w1) : low_halves_alone(w1));
  if constexpr (kOwn) {
    if (p.importance_f32 != nullptr) {
      store_pair<kSplit, kStochastic, kSpecial>(p.importance_f32 + i, next.importance, high_halves(w1));
    }
    if constexpr (kSplit) {
      if (p.importance_bf16 != nullptr) {
        store_pair<kSplit, kStochastic, kSpecial>(p.importance_bf16 + i, next.importance, high_halves(w1));
      }
    }
  }
  store_pair_but<kSplit, kStochastic, kSpecial>(p.param + i, isolated, next.theta, next.old_theta,
                                                low_halves(w0));
}

// The Pair of elements from `i` on; `isolated`: their mask bits, `index`: as first_indices() says.
template <bool kOwn, bool kSplit, bool kStochastic, class P, class S>
EPI_INLINE void step_pair(const StepContext& x, const StepPointers<P, S>& p, int64_t i, uint32_t isolated,
                          StepU index) {
  Pair g = load_pair<kSplit>(p.grad + i);
  if (x.has_multiplier) {
    g = {g.a * x.multiplier, g.b * x.multiplier};
    // rounded to nearest in memory; the update sees the product itself
    store_pair<kSplit, false, true>(p.grad + i, g, RandomBits{});
  }
  const Pair theta = load_pair<kSplit>(p.param + i);
  const Pair m = load_pair<kSplit>(p.exp_avg + i), v = load_pair<kSplit>(p.exp_avg_sq + i);
  const Pair g2{g.a * g.a, g.b * g.b};
  const auto a = adamw(x.c, theta.a, g.a, g2.a, m.a, v.a);
  const auto b = adamw(x.c, theta.b, g.b, g2.b, m.b, v.b);
  StepValues next{{a.theta, b.theta}, theta, {a.exp_avg, b.exp_avg}, {a.exp_avg_sq, b.exp_avg_sq}, {}};
  if constexpr (kOwn) {
    Pair u{};
    if (p.importance_f32 != nullptr) u = load_pair<kSplit>(p.importance_f32 + i);
    if constexpr (kSplit) {
      if (p.importance_bf16 != nullptr) u = load_pair<kSplit>(p.importance_bf16 + i);
    }
    next.importance = {importance_ema(x.c, u.a, g2.a), importance_ema(x.c, u.b, g2.b)};
  }

  RandomPair w0{}, w1{};
  if constexpr (kStochastic) {
    w0 = {random_word0_of(x, index), random_word0_of(x, index + x.to_second)};
    if (kOwn || sizeof(S) == 2) {
      w1 = {random_word1<StepF>(w0.a.word(), x.golden), random_word1<StepF>(w0.b.word(), x.golden)};
    }
  }
  // A NaN from bfloat16 values or from arithmetic has a low half of zeros: rounding adds too little to
  // it for a carry, as to an infinity. Only float32 values can hand on another.
  if constexpr (kSplit && (kOwn || sizeof(P) != 2 || sizeof(S) != 2)) {
    // a moment that is no number makes the weight so
    auto special = unordered(a.theta, b.theta);
    if constexpr (kOwn) special = special | unordered(next.importance.a, next.importance.b);
    if (any(special)) [[unlikely]] {
      return store_step<kOwn, kSplit, kStochastic, true>(p, i, isolated, next, w0, w1);
    }
  }
  store_step<kOwn, kSplit, kStochastic, false>(p, i, isolated, next, w0, w1);
}

template <bool kParam16, bool kState16, bool kOwn, bool kSplit, bool kStochastic>
void step_range(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  using P = stored_t<kParam16>;
  using S = stored_t<kState16>;
  constexpr int kLine = kSplit ? 32 : kPair;  // elements prefetched together: whole cache lines
  const StepContext x = step_context<kSplit>(row, start, stop, a);
  const uint8_t* mask = pointer<const uint8_t>(row, kIsolationMask);
  const StepPointers<P, S> p = step_pointers<P, S>(row);
  StatsSums<F16> sums = empty_sums<F16>();
  StepU index = first_indices<kSplit>(x);
  for (int64_t block = start; block < stop; block += kBlock) {
    const int64_t end = block + kBlock < stop ? block + kBlock : stop;
    int64_t i = block;
    for (; i + kLine <= end; i += kLine) {
      p.template prefetch<kOwn, kLine>(i);
#pragma GCC unroll 1
      for (int64_t j = i; j < i + kLine; j += kPair) {
        step_pair<kOwn, kSplit, kStochastic>(x, p, j, mask_word<PairBits>(mask, j), index);
        index = index + x.pace;
      }
    }
    for (; i < end; i += kPair) {
      const int count = end - i < kPair ? static_cast<int>(end - i) : kPair;
      StepTail<P, S, kPair> tail;
      step_pair<kOwn, kSplit, kStochastic>(x, tail.load(p, i, count), 0, mask_bits(mask, i, count), index);
      index = index + x.pace;
      tail.store(p, i, count, a.has_grad_multiplier);
    }
    if (a.stats != nullptr) {  // the block's importances, as stored, are still in the first cache
      const int64_t n = end - block;
      if (p.importance_f32 != nullptr) {
        add_range(sums, p.importance_f32 + block, n, a.moments);
      } else if (p.importance_bf16 != nullptr) {
        add_range(sums, p.importance_bf16 + block, n, a.moments);
      } else {
        add_range(sums, p.exp_avg_sq + block, n, a.moments);
      }
    }
  }
  if (a.stats != nullptr) *a.stats = reduce(sums);
}

template <bool kParam16, bool kState16>
void step_rounding(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  const bool own = row[kImportance] != 0;
  if (a.stochastic_rounding) {
    own ? step_range<kParam16, kState16, true, true, true>(row, start, stop, a)
        : step_range<kParam16, kState16, false, true, true>(row, start, stop, a);
  } else {
    own ? step_range<kParam16, kState16, true, true, false>(row, start, stop, a)
        : step_range<kParam16, kState16, false, true, false>(row, start, stop, a);
  }
}

inline void step_floats(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  switch (row[kFlags] & (kParamBf16 | kStateBf16 | kImportanceBf16)) {
    case 0:
      return row[kImportance] != 0 ? step_range<false, false, true, false, false>(row, start, stop, a)
                                   : step_range<false, false, false, false, false>(row, start, stop, a);
    case kImportanceBf16:
      return step_rounding<false, false>(row, start, stop, a);
    case kParamBf16:
    case kParamBf16 | kImportanceBf16:
      return step_rounding<true, false>(row, start, stop, a);
    case kStateBf16:
    case kStateBf16 | kImportanceBf16:
      return step_rounding<false, true>(row, start, stop, a);
    default:
      return step_rounding<true, true>(row, start, stop, a);
  }
}

}  // namespace epi::EPI_ISA
