// Stage 1 where a state is 8-bit: blocks of 64 elements, whose codes are written when the largest of the
// new values is known.

#pragma once

#include "cpu/codes_memory.h"
#include "cpu/step.h"

namespace epi::EPI_ISA {

template <bool kOwn, bool kStochastic, bool kSpecial, class P, class S>
EPI_INLINE void store_coded_step(const CodedPointers<P, S>& p, CodedBlock& block, int j, uint32_t isolated,
                                 const StepValues& next, const RandomPair& w0, const RandomPair& w1) {
  if constexpr (sizeof(S) == 1) {
    block.exp_avg.put(j, next.exp_avg);
    block.exp_avg_sq.put(j, next.exp_avg_sq);
  } else {
    store_pair<true, kStochastic, kSpecial>(p.exp_avg + j, next.exp_avg, high_halves(w0));
    store_pair<true, kStochastic, kSpecial>(p.exp_avg_sq + j, next.exp_avg_sq, low_halves(w1));
  }
  if constexpr (kOwn) {
    if (p.importance_u8 != nullptr) block.importance.put(j, next.importance);
    if (p.importance_f32 != nullptr) {
      store_pair<true, kStochastic, kSpecial>(p.importance_f32 + j, next.importance, high_halves(w1));
    }
    if (p.importance_bf16 != nullptr) {
      store_pair<true, kStochastic, kSpecial>(p.importance_bf16 + j, next.importance, high_halves(w1));
    }
  }
  store_pair_but<true, kStochastic, kSpecial>(p.param + j, isolated, next.theta, next.old_theta,
                                              low_halves(w0));
}

// The block that `p` points to; `isolated`: its mask bits. `index` as in step_range().
template <bool kOwn, bool kStochastic, class P, class S>
EPI_INLINE void step_block(const StepContext& x, const CodedPointers<P, S>& p, uint64_t isolated,
                           StepU& index) {
  CodedBlock block;
  block.clear();
  const CodedFactors factors = coded_factors<kOwn>(p);
#pragma GCC unroll 1
  for (int j = 0; j < kCodeBlock; j += kPair) {
    Pair g = load_pair<true>(p.grad + j);
    if (x.has_multiplier) {
      g = {g.a * x.multiplier, g.b * x.multiplier};
      store_pair<true, false, true>(p.grad + j, g, RandomBits{});
    }
    const Pair theta = load_pair<true>(p.param + j);
    const Pair m = load_state<true>(p.exp_avg + j, factors.exp_avg);
    const Pair v = load_state<false>(p.exp_avg_sq + j, factors.exp_avg_sq);
    const Pair g2{g.a * g.a, g.b * g.b};
    const auto a = adamw(x.c, theta.a, g.a, g2.a, m.a, v.a);
    const auto b = adamw(x.c, theta.b, g.b, g2.b, m.b, v.b);
    StepValues next{{a.theta, b.theta}, theta, {a.exp_avg, b.exp_avg}, {a.exp_avg_sq, b.exp_avg_sq}, {}};
    if constexpr (kOwn) {
      Pair u{};
      if (p.importance_u8 != nullptr) u = load_state<false>(p.importance_u8 + j, factors.importance);
      if (p.importance_f32 != nullptr) u = load_pair<true>(p.importance_f32 + j);
      if (p.importance_bf16 != nullptr) u = load_pair<true>(p.importance_bf16 + j);
      next.importance = {importance_ema(x.c, u.a, g2.a), importance_ema(x.c, u.b, g2.b)};
    }
    RandomPair w0{}, w1{};
    if constexpr (kStochastic) {
      w0 = {random_word0_of(x, index), random_word0_of(x, index + x.to_second)};
      w1 = {random_word1<StepF>(w0.a.word(), x.golden), random_word1<StepF>(w0.b.word(), x.golden)};
      block.w0.put(j, w0), block.w1.put(j, w1);
    }
    index = index + x.pace;
    const uint32_t bits = static_cast<PairBits>(isolated >> j);
    // as in step_pair(): only float32 values can hand on a NaN that rounding would spoil
    if constexpr (kOwn || sizeof(P) != 2 || sizeof(S) == 4) {
      auto special = unordered(a.theta, b.theta);
      if constexpr (kOwn) special = special | unordered(next.importance.a, next.importance.b);
      if (any(special)) [[unlikely]] {
        store_coded_step<kOwn, kStochastic, true>(p, block, j, bits, next, w0, w1);
        continue;
      }
    }
    store_coded_step<kOwn, kStochastic, false>(p, block, j, bits, next, w0, w1);
  }
  if constexpr (sizeof(S) == 1) {
    encode<kStochastic>(p.exp_avg, p.exp_avg_scale, block.exp_avg,
                        [&](int j) { return high_halves(block.w0.at(j)); });
    encode<kStochastic>(p.exp_avg_sq, p.exp_avg_sq_scale, block.exp_avg_sq,
                        [&](int j) { return low_halves(block.w1.at(j)); });
  }
  if constexpr (kOwn) {
    if (p.importance_u8 != nullptr) {
      encode<kStochastic>(p.importance_u8, p.importance_scale, block.importance,
                          [&](int j) { return high_halves(block.w1.at(j)); });
    }
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
  CodedPointers<P, S> p = coded_pointers<P, S>(row, start);
  StatsSums<F16> sums = empty_sums<F16>();
  StepU index = first_indices<true>(x);
  for (int64_t i = start; i < stop; i += kCodeBlock, p.advance()) {
    const int count = stop - i < kCodeBlock ? static_cast<int>(stop - i) : kCodeBlock;
    if (count == kCodeBlock) [[likely]] {
      p.prefetch();
      step_block<kOwn, kStochastic>(x, p, mask_word<uint64_t>(mask, i), index);
    } else {
      CodedTail<P, S> tail;
      const uint64_t isolated = mask_bits<uint64_t>(mask, i, count);
      step_block<kOwn, kStochastic>(x, tail.load(p, count), isolated, index);
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
