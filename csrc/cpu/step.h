// Stage 1, step: the masked update over a range of one parameter whose states are floats.
//
// With bfloat16 a block of elements takes two loops, moments and weights: in one the chain of root, division
// and rounding is longer than what a processor looks ahead. What is between the loops lies in the first
// cache. On a Zen 4 core without AVX-512, ns an element: 0.91 in one loop and 0.73 in two with stochastic
// rounding, 0.63 and 0.52 without. float32 alone waits for memory, 0.60 and 0.64, and takes one.

#pragma once

#include "cpu/stats.h"
#include "cpu/step_weights.h"

namespace epi::EPI_ISA {

// The gradient as the update sees it.
template <bool kSplit, class T>
EPI_INLINE Pair load_grad(const StepContext& x, T* grad) {
  Pair g = load_pair<kSplit>(grad);
  if (x.has_multiplier) {
    g = g * x.multiplier;
    store_pair<kSplit, false, true>(grad, g, PairU{});  // rounded to nearest in memory
  }
  return g;
}

template <bool kOwn, bool kSplit, bool kStochastic, bool kSpecial, class P, class S>
EPI_INLINE void store_moments(const StepPointers<P, S>& p, int64_t i, Pair m, Pair v, Pair u,
                              const PairWord& w0, const PairWord& w1) {
  store_pair<kSplit, kStochastic, kSpecial>(p.exp_avg + i, m, w0.high());
  store_pair<kSplit, kStochastic, kSpecial>(p.exp_avg_sq + i, v,
                                            kOwn ? low_half(w1.word()) : folded_halves(w1.mixed));
  if constexpr (kOwn) {
    if (p.importance_f32 != nullptr) {
      store_pair<kSplit, kStochastic, kSpecial>(p.importance_f32 + i, u, w1.high());
    }
    if constexpr (kSplit) {
      if (p.importance_bf16 != nullptr) {
        store_pair<kSplit, kStochastic, kSpecial>(p.importance_bf16 + i, u, w1.high());
      }
    }
  }
}

// The Pair of elements from `i` on, which starts at the range's element `at` and at the block's element `k`:
// its moments and its importance.
template <bool kAligned, bool kOwn, bool kSplit, bool kStochastic, class P, class S>
EPI_INLINE NewPair moments_of_pair(const StepContext& x, const StepPointers<P, S>& p, int64_t i, int64_t at) {
  const Pair g = load_grad<kSplit>(x, p.grad + i), g2 = g * g;
  const Pair m = exp_avg_ema(x.c, load_pair<kSplit>(p.exp_avg + i), g);
  const Pair v = exp_avg_sq_ema(x.c, load_pair<kSplit>(p.exp_avg_sq + i), g2);
  Pair u{};
  if constexpr (kOwn) {
    if (p.importance_f32 != nullptr) u = load_pair<kSplit>(p.importance_f32 + i);
    if constexpr (kSplit) {
      if (p.importance_bf16 != nullptr) u = load_pair<kSplit>(p.importance_bf16 + i);
    }
    u = importance_ema(x.c, u, g2);
  }
  PairWord w0{}, w1{};
  if constexpr (kStochastic) {
    w0 = x.keys.template word0<kAligned>(at);
    if (kOwn || sizeof(S) == 2) w1 = random_word1<Pair>(w0.word(), x.golden);
  }
  const NewPair next{m, denominator(x.c, v), kStochastic ? w0.word() : PairU{}};
  // A NaN from bfloat16 values or from arithmetic has a low half of zeros: rounding adds too little to
  // it for a carry, as to an infinity. Only float32 values can hand on another.
  if constexpr (kSplit && (kOwn || (sizeof(P) == 4 && sizeof(S) == 2))) {
    auto special = unordered(m.a, v.a) | unordered(m.b, v.b);
    if constexpr (kOwn) special = special | unordered(u.a, u.b);
    if (any(special)) [[unlikely]] {
      store_moments<kOwn, kSplit, kStochastic, true>(p, i, m, v, u, w0, w1);
      return next;
    }
  }
  store_moments<kOwn, kSplit, kStochastic, false>(p, i, m, v, u, w0, w1);
  return next;
}

// The elements from `i` on, `n` of them, whole pairs, which start at the range's element `at`. `mask`: their
// packed bits.
template <bool kAligned, bool kOwn, bool kSplit, bool kStochastic, class P, class S>
EPI_INLINE void step_pairs(const StepContext& x, const StepPointers<P, S>& p, int64_t i, int64_t n,
                           int64_t at, const uint8_t* mask, NewMoments& next) {
  constexpr bool kTwoLoops = kSplit;
  constexpr int kLine = kSplit ? 32 : kPair;  // elements prefetched together: whole cache lines
#pragma GCC unroll 1
  for (int64_t k = 0; k < n; k += kPair) {
    if (k % kLine == 0) p.template prefetch<kOwn, kLine>(i + k);
    const NewPair pair = moments_of_pair<kAligned, kOwn, kSplit, kStochastic>(x, p, i + k, at + k);
    if constexpr (kTwoLoops) {
      put(next.exp_avg + k, pair.exp_avg);
      put(next.denom + k, pair.denom);
      if (kStochastic) put(next.random + k, float_of(pair.random));
    } else {
      weights_of_pair<kSplit, kStochastic, S>(x, p.param + i + k, mask_word<PairBits>(mask, i + k), pair);
    }
  }
  if constexpr (kTwoLoops) weights_of_pairs<kStochastic, S>(x, p, i, n, mask, next);
}
// The same wherever the range starts.
template <bool kOwn, bool kSplit, bool kStochastic, class P, class S>
__attribute__((noinline)) void step_pairs_of_any(const StepContext& x, const StepPointers<P, S>& p, int64_t i,
                                                 int64_t n, int64_t at, const uint8_t* mask,
                                                 NewMoments& next) {
  step_pairs<false, kOwn, kSplit, kStochastic>(x, p, i, n, at, mask, next);
}

template <bool kParam16, bool kState16, bool kOwn, bool kSplit, bool kStochastic>
void step_range(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  using P = stored_t<kParam16>;
  using S = stored_t<kState16>;
  const StepContext x = step_context(row, start, a);
  const uint8_t* mask = pointer<const uint8_t>(row, kIsolationMask);
  const StepPointers<P, S> p = step_pointers<P, S>(row);
  const bool aligned = !kStochastic || x.keys.aligned();
  StatsSums<F16> sums = empty_sums<F16>();
  NewMoments next;
  for (int64_t i = start; i < stop; i += kBlock) {
    const int64_t n = stop - i < kBlock ? stop - i : kBlock, whole = n / kPair * kPair;
    if (aligned) [[likely]] {
      step_pairs<true, kOwn, kSplit, kStochastic>(x, p, i, whole, i - start, mask, next);
    } else {
      step_pairs_of_any<kOwn, kSplit, kStochastic>(x, p, i, whole, i - start, mask, next);
    }
    if (whole < n) [[unlikely]] {
      const int64_t rest = i + whole;
      const int count = static_cast<int>(n - whole);
      const uint32_t isolated = mask_bits(mask, rest, count);
      StepTail<P, S, kPair> tail;
      step_pairs_of_any<kOwn, kSplit, kStochastic>(x, tail.load(p, rest, count), 0, kPair, rest - start,
                                                   reinterpret_cast<const uint8_t*>(&isolated), next);
      tail.store(p, rest, count, a.has_grad_multiplier);
    }
    if (a.stats != nullptr) {  // the block's importances, as stored, are still in the first cache
      if (p.importance_f32 != nullptr) {
        add_range(sums, p.importance_f32 + i, n, a.moments);
      } else if (p.importance_bf16 != nullptr) {
        add_range(sums, p.importance_bf16 + i, n, a.moments);
      } else {
        add_range(sums, p.exp_avg_sq + i, n, a.moments);
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
