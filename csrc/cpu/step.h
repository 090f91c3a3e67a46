// Stage 1, step: the masked update over a range of one parameter.

#pragma once

#include "cpu/rows.h"
#include "cpu/stats.h"
#include "math/adamw.h"
#include "math/rounding.h"

namespace epi::EPI_ISA {

// Bytes ahead of the reads at which cache lines are asked for. The hardware's prefetchers stop at
// every page; see bench/README for the measurement behind the figure.
constexpr int64_t kPrefetchBytes = 1024;

template <class F>
struct StepContext {
  StepConstants<F> c;
  F multiplier;
  typename Lanes<F>::U sign;  // flips the gradient's sign when maximizing
  bool has_multiplier;
  // random bits: the logical index of element i is first_index + i
  uint32_t first_low;
  typename Lanes<F>::U key, key_after_wrap;
};

template <class F>
EPI_INLINE StepContext<F> step_context(TableRow row, int64_t start, const StepArguments& a) {
  using L = Lanes<F>;
  const uint64_t first = static_cast<uint64_t>(row[kIndexOffset] + start);
  const uint32_t key = static_cast<uint32_t>(row[kRngKey]);
  const uint32_t high = static_cast<uint32_t>(first >> 32);
  return {step_constants<F>(a.scalars),
          L::f32(a.grad_multiplier),
          L::u32((row[kFlags] & kMaximize) != 0 ? 0x80000000u : 0u),
          a.has_grad_multiplier,
          static_cast<uint32_t>(first),
          L::u32(mix<float>(key ^ high)),
          L::u32(mix<float>(key ^ (high + 1)))};
}

template <class P, class S>
struct StepPointers {
  P* param;
  P* grad;
  S* exp_avg;
  S* exp_avg_sq;
  float* importance_f32;  // at most one of the two is there: the parameter's own importance
  uint16_t* importance_bf16;

  // Own importances are a branch of the loop, not one more instance of it: it always goes one way,
  // and three times the instances took three times as long to compile.
  EPI_INLINE StepPointers at(int64_t i) const {
    return {param + i,
            grad + i,
            exp_avg + i,
            exp_avg_sq + i,
            importance_f32 != nullptr ? importance_f32 + i : nullptr,
            importance_bf16 != nullptr ? importance_bf16 + i : nullptr};
  }
  EPI_INLINE void prefetch() const {
    ahead(param), ahead(grad), ahead(exp_avg), ahead(exp_avg_sq);
    if (importance_f32 != nullptr) ahead(importance_f32);
    if (importance_bf16 != nullptr) ahead(importance_bf16);
  }
  template <class T>
  static EPI_INLINE void ahead(const T* p) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes);
  }
};

// The last, incomplete vector of a range: copied here, updated as a whole, copied back.
template <class P, class S>
struct StepTail {
  P param[kWidth] = {}, grad[kWidth] = {};
  S exp_avg[kWidth] = {}, exp_avg_sq[kWidth] = {};
  float importance_f32[kWidth] = {};
  uint16_t importance_bf16[kWidth] = {};

  __attribute__((noinline)) StepPointers<P, S> load(const StepPointers<P, S>& p, int count) {
    const StepPointers<P, S> local{param,
                                   grad,
                                   exp_avg,
                                   exp_avg_sq,
                                   p.importance_f32 != nullptr ? importance_f32 : nullptr,
                                   p.importance_bf16 != nullptr ? importance_bf16 : nullptr};
    move(local, p, count);
    return local;
  }
  __attribute__((noinline)) void store(const StepPointers<P, S>& local,
                                       const StepPointers<P, S>& p, int count) {
    move(p, local, count);
  }
  static void move(const StepPointers<P, S>& to, const StepPointers<P, S>& from, int count) {
    copy(to.param, from.param, count);
    copy(to.grad, from.grad, count);
    copy(to.exp_avg, from.exp_avg, count);
    copy(to.exp_avg_sq, from.exp_avg_sq, count);
    if (from.importance_f32 != nullptr) copy(to.importance_f32, from.importance_f32, count);
    if (from.importance_bf16 != nullptr) copy(to.importance_bf16, from.importance_bf16, count);
  }
};

template <bool kStochastic, class F>
EPI_INLINE void store_state(float* p, F x, typename Lanes<F>::U) {
  store(p, x);
}
template <bool kStochastic, class F>
EPI_INLINE void store_state(uint16_t* p, F x, typename Lanes<F>::U random_bits) {
  store_low(p, kStochastic ? round_stochastic_bf16(x, random_bits) : round_nearest_bf16(x));
}
template <bool kStochastic, class F>
EPI_INLINE void store_param(float* p, typename Lanes<F>::M where, F x, F old,
                            typename Lanes<F>::U) {
  store_where(p, where, x, old);
}
template <bool kStochastic, class F>
EPI_INLINE void store_param(uint16_t* p, typename Lanes<F>::M where, F x, F old,
                            typename Lanes<F>::U random_bits) {
  const auto half = kStochastic ? round_stochastic_bf16(x, random_bits) : round_nearest_bf16(x);
  store_low_where(p, where, half, old);
}

// Sixteen elements at `p`; `isolated`: their mask bits; `low`: low word of the first one's index.
template <class F, bool kStochastic, class P, class S>
EPI_INLINE void step_lanes(const StepContext<F>& x, const StepPointers<P, S>& p, uint32_t isolated,
                           uint32_t low) {
  using L = Lanes<F>;
  using U = typename L::U;
  using M = typename L::M;
  const F theta = load<F>(p.param);
  F g = load<F>(p.grad);
  if (x.has_multiplier) {
    g = g * x.multiplier;
    store_state<false>(p.grad, g, U{});  // rounded to nearest; the update sees the product itself
  }
  g = float_of(bits_of(g) ^ x.sign);
  const F g_squared = g * g;
  const auto next = adamw(x.c, theta, g, g_squared, load<F>(p.exp_avg), load<F>(p.exp_avg_sq));

  U w0{}, w1{};
  if constexpr (kStochastic) {
    const U index_low = L::iota(low);
    w0 = random_word0<F>(select(index_low < L::u32(x.first_low), x.key_after_wrap, x.key), index_low);
    if (sizeof(S) == 2 || p.importance_bf16 != nullptr) w1 = random_word1<F>(w0);
  }
  const U low_half = L::u32(0xFFFFu);
  store_state<kStochastic>(p.exp_avg, next.exp_avg, w0 >> 16);
  store_state<kStochastic>(p.exp_avg_sq, next.exp_avg_sq, w1 & low_half);
  if (p.importance_f32 != nullptr) {
    store(p.importance_f32, importance_ema(x.c, load<F>(p.importance_f32), g_squared));
  } else if (p.importance_bf16 != nullptr) {
    const F u = importance_ema(x.c, load<F>(p.importance_bf16), g_squared);
    store_state<kStochastic>(p.importance_bf16, u, w1 >> 16);
  }
  store_param<kStochastic>(p.param, !from_bits<M>(isolated), next.theta, theta, w0 & low_half);
}

template <class F, bool kParam, bool kState, bool kStochastic>
void step_range(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  using P = stored_t<kParam>;
  using S = stored_t<kState>;
  const StepContext<F> x = step_context<F>(row, start, a);
  const uint8_t* mask = pointer<const uint8_t>(row, kIsolationMask);
  const bool own_bf16 = (row[kFlags] & kImportanceBf16) != 0;
  const StepPointers<P, S> p{pointer<P>(row, ::epi::kParam),
                             pointer<P>(row, kGrad),
                             pointer<S>(row, kExpAvg),
                             pointer<S>(row, kExpAvgSq),
                             own_bf16 ? nullptr : pointer<float>(row, kImportance),
                             own_bf16 ? pointer<uint16_t>(row, kImportance) : nullptr};
  StatsSums<F> sums = empty_sums<F>();
  StepTail<P, S> tail;
  for (int64_t block = start; block < stop; block += kBlock) {
    const int64_t end = block + kBlock < stop ? block + kBlock : stop;
    for (int64_t i = block; i < end; i += kWidth) {
      const int count = end - i < kWidth ? static_cast<int>(end - i) : kWidth;
      const uint32_t low = x.first_low + static_cast<uint32_t>(i - start);
      const auto here = p.at(i);
      auto at = here;
      if (count < kWidth) [[unlikely]] at = tail.load(here, count);
      here.prefetch();
      step_lanes<F, kStochastic>(x, at, mask_bits(mask, i, count), low);
      if (count < kWidth) [[unlikely]] tail.store(at, here, count);
    }
    if (a.stats != nullptr) {  // the block's importances, as stored, are still in the first cache
      const auto here = p.at(block);
      if (here.importance_f32 != nullptr) {
        add_range(sums, here.importance_f32, end - block, a.moments);
      } else if (here.importance_bf16 != nullptr) {
        add_range(sums, here.importance_bf16, end - block, a.moments);
      } else {
        add_range(sums, here.exp_avg_sq, end - block, a.moments);
      }
    }
  }
  if (a.stats != nullptr) *a.stats = reduce(sums);
}

template <class F, bool kParam, bool kState>
void step_rounding(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  if (a.stochastic_rounding) {
    step_range<F, kParam, kState, true>(row, start, stop, a);
  } else {
    step_range<F, kParam, kState, false>(row, start, stop, a);
  }
}

template <class F>
void step(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  switch (row[kFlags] & (kParamBf16 | kStateBf16)) {
    case 0:
      // random bits are drawn for bfloat16 alone
      if ((row[kFlags] & kImportanceBf16) == 0) {
        return step_range<F, false, false, false>(row, start, stop, a);
      }
      return step_rounding<F, false, false>(row, start, stop, a);
    case kParamBf16:
      return step_rounding<F, true, false>(row, start, stop, a);
    case kStateBf16:
      return step_rounding<F, false, true>(row, start, stop, a);
    default:
      return step_rounding<F, true, true>(row, start, stop, a);
  }
}

}  // namespace epi::EPI_ISA
