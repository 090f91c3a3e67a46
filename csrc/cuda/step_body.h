// Stage 1, step: the masked AdamW update of one program's elements (epi_kernels/reference/step.py).

#pragma once

#include "cuda/stats_body.h"
#include "math/adamw.h"

#include <type_traits>

namespace epi::cuda {

// How a parameter's own importance is stored; SharedImportance: u is exp_avg_sq.
struct SharedImportance {};
template <class U>
constexpr bool kOwn = true;
template <>
inline constexpr bool kOwn<SharedImportance> = false;

// Random bits of a span's elements. A span is shorter than 2^32 elements: two keys serve it.
struct RandomStream {
  uint64_t first;  // logical index of the row's element 0
  uint32_t high;   // high word of the span's first index
  uint32_t key, next_key;

  EPI_KERNEL RandomStream(const Span& span)
      : first(static_cast<uint64_t>(span.row[kIndexOffset])),
        high(static_cast<uint32_t>((first + static_cast<uint64_t>(span.begin)) >> 32)) {
    const uint32_t rng_key = static_cast<uint32_t>(span.row[kRngKey]);
    key = math::mix<float>(rng_key ^ high);
    next_key = math::mix<float>(rng_key ^ (high + 1));
  }
  EPI_KERNEL math::RandomWord<uint32_t> word0(int64_t element) const {
    const uint64_t index = first + static_cast<uint64_t>(element);
    const uint32_t element_key = static_cast<uint32_t>(index >> 32) == high ? key : next_key;
    return math::random_word0<float>(element_key, static_cast<uint32_t>(index));
  }
};

// P, S: param and grad, exp_avg and exp_avg_sq, as stored (float, or uint16_t for bfloat16).
template <class P, class S, class U>
struct StepTensors {
  using Own = std::conditional_t<kOwn<U>, U, S>;
  P* param;
  P* grad;
  S* exp_avg;
  S* exp_avg_sq;
  Own* importance;
  const uint8_t* isolation_mask;  // nullptr: nothing is isolated

  EPI_KERNEL StepTensors(const Span& span)
      : param(span.pointer<P>(kParam)),
        grad(span.pointer<P>(kGrad)),
        exp_avg(span.pointer<S>(kExpAvg)),
        exp_avg_sq(span.pointer<S>(kExpAvgSq)),
        importance(span.pointer<Own>(kImportance)),
        isolation_mask(span.pointer<const uint8_t>(kIsolationMask)) {}
};

// Elements start .. start + N - 1. N > 1: one 16-byte access or two for each tensor, and the N mask
// bits lie in one byte. `include(u)` takes the importances as stored.
template <int N, class P, class S, class U, class Include>
EPI_KERNEL void update(const StepTensors<P, S, U>& t, const math::StepConstants<float>& c,
                       const StepArgs& args, float multiplier, bool maximize, const RandomStream& random,
                       int64_t start, const Include& include) {
  using Own = typename StepTensors<P, S, U>::Own;
  Pack<P, N> theta = load<P, N>(t.param + start);
  Pack<P, N> grad = load<P, N>(t.grad + start);
  Pack<S, N> exp_avg = load<S, N>(t.exp_avg + start);
  Pack<S, N> exp_avg_sq = load<S, N>(t.exp_avg_sq + start);
  Pack<Own, N> importance;
  if constexpr (kOwn<U>) importance = load<Own, N>(t.importance + start);
  uint32_t isolated = 0;
  if (t.isolation_mask != nullptr) isolated = t.isolation_mask[start >> 3] >> (start & 7);

#pragma unroll
  for (int j = 0; j < N; ++j) {
    float g = widen(grad.v[j]);
    if (args.grad_multiplier != nullptr) {
      g = g * multiplier;
      grad.v[j] = narrow<P>(g, false, 0);
    }
    if (maximize) g = -g;
    const float g_squared = g * g;
    const math::Updated<float> updated =
        math::adamw(c, widen(theta.v[j]), g, g_squared, widen(exp_avg.v[j]), widen(exp_avg_sq.v[j]));

    math::RandomWord<uint32_t> w0{}, w1{};
    constexpr bool kRounds = sizeof(P) == 2 || sizeof(S) == 2 || sizeof(Own) == 2;
    if (kRounds && args.stochastic_rounding) {
      w0 = random.word0(start + j);
      w1 = math::random_word1<float>(w0.word(), math::kGolden);
    }
    const bool sr = args.stochastic_rounding;
    exp_avg.v[j] = narrow<S>(updated.exp_avg, sr, w0.high());
    exp_avg_sq.v[j] = narrow<S>(updated.exp_avg_sq, sr, w1.word() & 0xFFFFu);
    if constexpr (kOwn<U>) {
      const float u = math::importance_ema(c, widen(importance.v[j]), g_squared);
      importance.v[j] = narrow<Own>(u, sr, w1.high());
      include(widen(importance.v[j]));
    } else {
      include(widen(exp_avg_sq.v[j]));
    }
    const P moved = narrow<P>(updated.theta, sr, w0.word() & 0xFFFFu);
    theta.v[j] = (isolated >> j & 1u) != 0 ? theta.v[j] : moved;  // an isolated element keeps its bits
  }

  store<P, N>(t.param + start, theta);
  if (args.grad_multiplier != nullptr) store<P, N>(t.grad + start, grad);
  store<S, N>(t.exp_avg + start, exp_avg);
  store<S, N>(t.exp_avg_sq + start, exp_avg_sq);
  if constexpr (kOwn<U>) store<Own, N>(t.importance + start, importance);
}

// Four elements a thread where every tensor is float32, so that a warp's accesses are contiguous;
// eight where one is bfloat16, so that its access is 16 bytes wide.
template <class P, class S, class U>
constexpr int kStepWidth =
    sizeof(P) == 2 || sizeof(S) == 2 || sizeof(typename StepTensors<P, S, U>::Own) == 2 ? 8 : 4;

template <class P, class S, class U, class Block, class Include>
EPI_KERNEL void step_span(const StepArgs& args, const Span& span, const Block& block,
                          const Include& include) {
  constexpr int kWidth = kStepWidth<P, S, U>;
  if (span.has(kSkipped)) return;
  const StepTensors<P, S, U> tensors(span);
  const RandomStream random(span);
  const auto constants = math::step_constants<float>(args.scalars + span.row_index * math::kStepScalars);
  const bool maximize = span.has(kMaximize);
  const float multiplier = args.grad_multiplier != nullptr ? *args.grad_multiplier : 1.0f;
  int64_t begin = span.begin;
  if (span.has(kAligned)) {
    const int64_t whole = (span.end - begin) / kWidth;
#pragma unroll 1
    for (int64_t i = block.thread(); i < whole; i += block.threads()) {
      update<kWidth>(tensors, constants, args, multiplier, maximize, random, begin + i * kWidth, include);
    }
    begin += whole * kWidth;
  }
#pragma unroll 1
  for (int64_t i = begin + block.thread(); i < span.end; i += block.threads()) {
    update<1>(tensors, constants, args, multiplier, maximize, random, i, include);
  }
}

template <class P, class S, class U, class Block>
EPI_KERNEL void step_program(const StepArgs& args, const Block& block) {
  for_each_span(args.work, block.index(),
                [&](const Span& span) { step_span<P, S, U>(args, span, block, [](float) {}); });
}

// The same, reducing the stats of the layers that have a row. shared: [threads]
template <class P, class S, class U, class Block>
EPI_KERNEL void step_stats_program(const StepArgs& args, const Block& block, StatsPartial* shared) {
  StatsCollector<Block> collector{block, args.stats, block.index(), shared};
  for_each_span(args.work, block.index(), [&](const Span& span) {
    collector.enter(span);
    step_span<P, S, U>(args, span, block, [&](float u) { collector.include(u); });
  });
  collector.flush();
}

}  // namespace epi::cuda
