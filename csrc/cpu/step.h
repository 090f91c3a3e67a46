// Stage 1, step: the masked update over a range of one parameter.

#pragma once

#include "cpu/rows.h"
#include "cpu/stats.h"
#include "cpu/step_memory.h"
#include "math/adamw.h"
#include "math/rounding.h"

namespace epi::EPI_ISA {

struct StepContext {
  StepConstants<F16> c;
  F16 multiplier;
  bool has_multiplier;
  // random bits: the logical index of the range's element i is first + i; its low word may wrap
  uint32_t first_low;
  U16 key, key_after_wrap;
};

EPI_INLINE StepContext step_context(TableRow row, int64_t start, const StepArguments& a) {
  using L = Lanes<F16>;
  const uint64_t first = static_cast<uint64_t>(row[kIndexOffset] + start);
  const uint32_t key = static_cast<uint32_t>(row[kRngKey]);
  const uint32_t high = static_cast<uint32_t>(first >> 32);
  StepContext x{step_constants<F16>(a.scalars), L::f32(a.grad_multiplier),
                a.has_grad_multiplier,          static_cast<uint32_t>(first),
                L::u32(mix<float>(key ^ high)), L::u32(mix<float>(key ^ (high + 1)))};
  // c * (-g) == (-c) * g to the bit, and g * g never sees the sign
  if ((row[kFlags] & kMaximize) != 0) x.c.one_minus_beta1 = L::f32(-a.scalars[1]);
  return x;
}

// w0 of the elements low, low + 2, ... (kSplit) or low, low + 1, ...
template <bool kSplit>
EPI_INLINE U16 first_words(const StepContext& x, uint32_t low) {
  using L = Lanes<F16>;
  const U16 lane = L::iota(0);
  const U16 index_low = (kSplit ? lane + lane : lane) + L::u32(low);
  const U16 key = select(index_low < L::u32(x.first_low), x.key_after_wrap, x.key);
  return random_word0<F16>(key, index_low);
}

struct StepValues {
  Pair theta, old_theta, exp_avg, exp_avg_sq, importance;
};

template <bool kSplit, bool kStochastic, bool kSpecial, class P, class S>
EPI_INLINE void store_step(const StepPointers<P, S>& p, int64_t i, uint32_t isolated, const StepValues& next,
                           RandomPair w0, RandomPair w1) {
  store_pair<kSplit, kStochastic, kSpecial>(p.exp_avg + i, next.exp_avg, high_halves(w0));
  store_pair<kSplit, kStochastic, kSpecial>(p.exp_avg_sq + i, next.exp_avg_sq, low_halves(w1));
  if (p.importance_f32 != nullptr) {
    store_pair<kSplit, kStochastic, kSpecial>(p.importance_f32 + i, next.importance, w1);
  }
  if constexpr (kSplit) {
    if (p.importance_bf16 != nullptr) {
      store_pair<kSplit, kStochastic, kSpecial>(p.importance_bf16 + i, next.importance, high_halves(w1));
    }
  }
  store_pair_but<kSplit, kStochastic, kSpecial>(p.param + i, isolated, next.theta, next.old_theta,
                                                low_halves(w0));
}

// The thirty-two elements from `i` on; `isolated`: their mask bits, `low`: the low word of the first
// one's logical index.
template <bool kSplit, bool kStochastic, class P, class S>
EPI_INLINE void step_pair(const StepContext& x, const StepPointers<P, S>& p, int64_t i, uint32_t isolated,
                          uint32_t low) {
  Pair g = load_pair<kSplit>(p.grad + i);
  if (x.has_multiplier) {
    g = {g.a * x.multiplier, g.b * x.multiplier};
    // rounded to nearest in memory; the update sees the product itself
    store_pair<kSplit, false, true>(p.grad + i, g, RandomPair{});
  }
  const Pair theta = load_pair<kSplit>(p.param + i);
  const Pair m = load_pair<kSplit>(p.exp_avg + i), v = load_pair<kSplit>(p.exp_avg_sq + i);
  const Pair g2{g.a * g.a, g.b * g.b};
  const auto a = adamw(x.c, theta.a, g.a, g2.a, m.a, v.a);
  const auto b = adamw(x.c, theta.b, g.b, g2.b, m.b, v.b);
  StepValues next{{a.theta, b.theta}, theta, {a.exp_avg, b.exp_avg}, {a.exp_avg_sq, b.exp_avg_sq}, {}};
  if (p.importance_f32 != nullptr) {
    const Pair u = load_pair<kSplit>(p.importance_f32 + i);
    next.importance = {importance_ema(x.c, u.a, g2.a), importance_ema(x.c, u.b, g2.b)};
  }
  if constexpr (kSplit) {
    if (p.importance_bf16 != nullptr) {
      const Pair u = load_pair<kSplit>(p.importance_bf16 + i);
      next.importance = {importance_ema(x.c, u.a, g2.a), importance_ema(x.c, u.b, g2.b)};
    }
  }

  RandomPair w0{}, w1{};
  if constexpr (kStochastic) {
    w0 = {first_words<kSplit>(x, low), first_words<kSplit>(x, low + (kSplit ? 1 : kWidth))};
    if (sizeof(S) == 2 || p.importance_bf16 != nullptr) {
      w1 = {random_word1<F16>(w0.a), random_word1<F16>(w0.b)};
    }
  }
  if constexpr (kSplit) {
    // a moment that is no number makes the weight so; an infinity rounds to itself like any value
    auto special = unordered(a.theta, b.theta);
    if (p.importance_bf16 != nullptr) {
      special = special | unordered(next.importance.a, next.importance.b);
    }
    if (any(special)) [[unlikely]] {
      return store_step<kSplit, kStochastic, true>(p, i, isolated, next, w0, w1);
    }
  }
  store_step<kSplit, kStochastic, false>(p, i, isolated, next, w0, w1);
}

template <bool kParam16, bool kState16, bool kSplit, bool kStochastic>
void step_range(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  using P = stored_t<kParam16>;
  using S = stored_t<kState16>;
  const StepContext x = step_context(row, start, a);
  const uint8_t* mask = pointer<const uint8_t>(row, kIsolationMask);
  const StepPointers<P, S> p = step_pointers<P, S>(row);
  StatsSums<F16> sums = empty_sums<F16>();
  for (int64_t block = start; block < stop; block += kBlock) {
    const int64_t end = block + kBlock < stop ? block + kBlock : stop;
    int64_t i = block;
    for (; i + kPair <= end; i += kPair) {
      p.prefetch(i);
      step_pair<kSplit, kStochastic>(x, p, i, mask_word(mask, i),
                                     x.first_low + static_cast<uint32_t>(i - start));
    }
    if (i < end) {
      const int count = static_cast<int>(end - i);
      StepTail<P, S> tail;
      step_pair<kSplit, kStochastic>(x, tail.load(p, i, count), 0, mask_bits(mask, i, count),
                                     x.first_low + static_cast<uint32_t>(i - start));
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
  if (a.stochastic_rounding) {
    step_range<kParam16, kState16, true, true>(row, start, stop, a);
  } else {
    step_range<kParam16, kState16, true, false>(row, start, stop, a);
  }
}

inline void step(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  switch (row[kFlags] & (kParamBf16 | kStateBf16 | kImportanceBf16)) {
    case 0:
      return step_range<false, false, false, false>(row, start, stop, a);
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
