// Stage 1, step: the masked AdamW update of one program's elements (epi_kernels/reference/step.py).

#pragma once

#include "cuda/stats_body.h"
#include "math/adamw.h"
#include "math/master.h"

#include <type_traits>

namespace epi::cuda {

// How a parameter's own importance is stored; SharedImportance: u is exp_avg_sq.
struct SharedImportance {};
template <class U>
constexpr bool kOwn = true;
template <>
inline constexpr bool kOwn<SharedImportance> = false;

// How weights are stored that have a correction beside them: as bfloat16. Whether corrections have 16 bits or
// 8 is asked at run time, which halves the kernels to compile.
struct Corrected {};
template <class P>
constexpr bool kCorrected = std::is_same_v<P, Corrected>;
template <class S>
constexpr bool kNibbles = std::is_same_v<S, Nibbles>;
template <class P>
using weight_t = std::conditional_t<kCorrected<P>, uint16_t, P>;

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

// P, S: param and grad, exp_avg and exp_avg_sq, as stored (float, uint16_t for bfloat16, uint8_t for codes; P
// may be Corrected, S Nibbles).
template <class P, class S, class U>
struct StepTensors {
  using Own = std::conditional_t<kOwn<U>, U, S>;
  using Weight = weight_t<P>;
  Weight* param;
  Weight* grad;
  S* exp_avg;
  S* exp_avg_sq;
  Own* importance;
  uint8_t* exp_avg_scale;  // of codes, as the two below
  uint8_t* exp_avg_sq_scale;
  uint8_t* importance_scale;
  const uint8_t* isolation_mask;  // nullptr: nothing is isolated
  float bound = 0.0f;             // of 4-bit states: math::moment_bound
  uint16_t* correction;           // of Corrected
  bool bytes;                     // corrections have 8 bits

  EPI_KERNEL StepTensors(const Span& span)
      : param(span.pointer<Weight>(kParam)),
        grad(span.pointer<Weight>(kGrad)),
        exp_avg(span.pointer<S>(kExpAvg)),
        exp_avg_sq(span.pointer<S>(kExpAvgSq)),
        importance(span.pointer<Own>(kImportance)),
        exp_avg_scale(span.pointer<uint8_t>(kExpAvgScale)),
        exp_avg_sq_scale(span.pointer<uint8_t>(kExpAvgSqScale)),
        importance_scale(span.pointer<uint8_t>(kImportanceScale)),
        isolation_mask(span.pointer<const uint8_t>(kIsolationMask)),
        correction(span.pointer<uint16_t>(kWeightCorrection)),
        bytes(span.has(kCorrectionInt8)) {}
};

// Corrections of 16 bits, or of 8 in the upper halves of 16.
template <int N, bool kWide, class Tensors>
EPI_KERNEL Pack<uint16_t, N> load_corrections(const Tensors& t, int64_t start, int count) {
  if (!t.bytes) return load<uint16_t, N, kWide>(t.correction + start, count);
  const auto bytes = load<uint8_t, N, kWide>(reinterpret_cast<uint8_t*>(t.correction) + start, count);
  Pack<uint16_t, N> low;
#pragma unroll
  for (int j = 0; j < N; ++j) low.v[j] = static_cast<uint16_t>(bytes.v[j] << 8);
  return low;
}
template <int N, bool kWide, class Tensors>
EPI_KERNEL void store_corrections(const Tensors& t, int64_t start, const Pack<uint16_t, N>& low, int count) {
  if (!t.bytes) return store<uint16_t, N, kWide>(t.correction + start, low, count);
  Pack<uint8_t, N> bytes;
#pragma unroll
  for (int j = 0; j < N; ++j) bytes.v[j] = static_cast<uint8_t>(low.v[j] >> 8);
  store<uint8_t, N, kWide>(reinterpret_cast<uint8_t*>(t.correction) + start, bytes, count);
}

// "Random bits" that round to nearest: both halves 0x8000.
constexpr math::RandomWord<uint32_t> kNearest{0x80000000u};

// Stores x, which becomes what a reader will see. `random(j)`: 16 bits.
template <bool kSigned, bool kWide, class T, int N, class Block, class Random>
EPI_KERNEL void store_state(const Block& block, T* p, uint8_t* scales, int64_t start, int count,
                            Pack<float, N>& x, uint32_t to_nearest, const Random& random) {
  Pack<T, N> r;
  if constexpr (kCodes<T>) {
    uint32_t top = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const uint32_t magnitude = magnitude_word<kSigned>(x.v[j]);
      if ((kWide || j < count) && magnitude > top) top = magnitude;
    }
    const auto scaling = math::Block<kSigned>::of_values(block.group_max(top));
#pragma unroll
    for (int j = 0; j < N; ++j) r.v[j] = static_cast<T>(encode<kSigned>(x.v[j], random(j), scaling));
    x = values<kSigned>(r, scaling.scale());
    if (count > 0 && block.thread() % kGroup == 0) {
      scales[start / math::kCodeBlock] = static_cast<uint8_t>(scaling.scale());
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) r.v[j] = narrow<T>(x.v[j], random(j), to_nearest);
    x = values<kSigned>(r, 0);
  }
  store<T, N, kWide>(p + start, r, count);
}

// The mask bits of N elements, of which `count` exist; those of N < 16 lie in one byte.
template <int N>
EPI_KERNEL uint32_t load_isolated(const uint8_t* mask, int64_t start, int count) {
  if (mask == nullptr || count <= 0) return 0;
  uint32_t bits = mask[start >> 3] >> (start & 7);
  if (N == 16 && count > 8) bits |= static_cast<uint32_t>(mask[(start >> 3) + 1]) << 8;
  return bits;
}

// Elements start .. start + N - 1. kWide: all of them exist, each tensor takes accesses of 16 bytes.
// Else the first `count` do, maybe none. `include(u)` takes the importances as stored. Where a tensor
// is stored as codes N is 16, and whole warps come here, group by group over blocks of 64.
template <int N, bool kWide, class P, class S, class U, class Block, class Include>
EPI_KERNEL void update(const Block& block, const StepTensors<P, S, U>& t, const math::StepConstants<float>& c,
                       const StepArgs& args, float multiplier, const RandomStream& random, int64_t start,
                       int count, const Include& include) {
  using Own = typename StepTensors<P, S, U>::Own;
  using Weight = weight_t<P>;
  Pack<Weight, N> theta = load<Weight, N, kWide>(t.param + start, count);
  Pack<uint16_t, N> low;
  if constexpr (kCorrected<P>) low = load_corrections<N, kWide>(t, start, count);
  Pack<Weight, N> grad = load<Weight, N, kWide>(t.grad + start, count);
  Pack<float, N> m, v, u;
  float square_scale = 0.0f;
  if constexpr (kNibbles<S>) {
    square_scale = scale_at(t.exp_avg_sq_scale, start, count);
    const auto square_codes = load_nibbles<N, kWide>(t.exp_avg_sq, start, count);
    const auto codes = load_nibbles<N, kWide>(t.exp_avg, start, count);
    m = averages(codes, scale_at(t.exp_avg_scale, start, count), square_codes);
    v = squares(square_codes, square_scale);
  } else {
    const auto exp_avg = load<S, N, kWide>(t.exp_avg + start, count);
    const auto exp_avg_sq = load<S, N, kWide>(t.exp_avg_sq + start, count);
    m = values<true>(exp_avg, load_scale<S>(t.exp_avg_scale, start, count));
    v = values<false>(exp_avg_sq, load_scale<S>(t.exp_avg_sq_scale, start, count));
  }
  if constexpr (kOwn<U>) {
    const auto importance = load<Own, N, kWide>(t.importance + start, count);
    u = values<false>(importance, load_scale<Own>(t.importance_scale, start, count));
  }
  const uint32_t isolated = load_isolated<N>(t.isolation_mask, start, count);

  if (args.grad_multiplier != nullptr) {
    Pack<Weight, N> unscaled;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      unscaled.v[j] = narrow<Weight>(widen(grad.v[j]) * multiplier, 0x8000u, 1u);
    }
    store<Weight, N, kWide>(t.grad + start, unscaled, count);
  }
  const uint32_t to_nearest = args.stochastic_rounding ? 0u : 1u;
  const auto weight_rounding =
      math::weight_rounding<float>(kCorrected<P> && t.bytes, args.stochastic_rounding);
  math::RandomWord<uint32_t> w0[N], w1[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float g = widen(grad.v[j]) * multiplier;  // 1 where there is none
    const float g_squared = g * g;
    float weight = widen(theta.v[j]);
    if constexpr (kCorrected<P>) weight = math::joined_weight<float>(math::bits_of(weight), low.v[j]);
    const math::Updated<float> updated = math::adamw(c, weight, g, g_squared, m.v[j], v.v[j]);
    m.v[j] = updated.exp_avg;
    v.v[j] = updated.exp_avg_sq;
    if constexpr (kOwn<U>) u.v[j] = math::importance_ema(c, u.v[j], g_squared);

    // selected, not branched around: branches between the elements cost registers
    w0[j] = w1[j] = kNearest;
    constexpr bool kRounds = sizeof(Weight) < 4 || sizeof(S) < 4 || sizeof(Own) < 4;
    if constexpr (kRounds) {
      const auto word = random.word0(start + j);
      w0[j].mixed = to_nearest != 0 ? kNearest.mixed : word.mixed;
      const auto next = math::random_word1<float>(word.word(), math::kGolden);
      w1[j].mixed = to_nearest != 0 ? kNearest.mixed : next.mixed;
    }
    const bool keeps = (isolated >> j & 1u) != 0;  // an isolated element keeps its bits
    if constexpr (kCorrected<P>) {
      const uint32_t word = math::weight_word(updated.theta, w0[j].word() & 0xFFFFu, weight_rounding);
      const auto moved = static_cast<uint16_t>(math::nearest_half<float>(word) >> 16);
      theta.v[j] = keeps ? theta.v[j] : moved;
      low.v[j] = keeps ? low.v[j] : static_cast<uint16_t>(word);
    } else {
      const Weight moved = narrow<Weight>(updated.theta, w0[j].word() & 0xFFFFu, to_nearest);
      theta.v[j] = keeps ? theta.v[j] : moved;
    }
  }
  store<Weight, N, kWide>(t.param + start, theta, count);
  if constexpr (kCorrected<P>) store_corrections<N, kWide>(t, start, low, count);
  if constexpr (kNibbles<S>) {
    store_moments<kWide>(
        block, t.exp_avg, t.exp_avg_sq, t.exp_avg_scale, t.exp_avg_sq_scale, start, count, t.bound,
        square_scale, m, v, [&](int j) { return w0[j].high(); },
        [&](int j) { return to_nearest != 0 ? math::kNearestSquare : w1[j].word() & 0x7FFFFFu; });
  } else {
    store_state<true, kWide>(block, t.exp_avg, t.exp_avg_scale, start, count, m, to_nearest,
                             [&](int j) { return w0[j].high(); });
    store_state<false, kWide>(block, t.exp_avg_sq, t.exp_avg_sq_scale, start, count, v, to_nearest,
                              [&](int j) { return w1[j].word() & 0xFFFFu; });
  }
  if constexpr (kOwn<U>) {
    store_state<false, kWide>(block, t.importance, t.importance_scale, start, count, u, to_nearest,
                              [&](int j) { return w1[j].high(); });
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (kWide || j < count) include(kOwn<U> ? u.v[j] : v.v[j]);
  }
}

// Elements a thread takes at once: of the narrowest type an access of 16 bytes is one or two of them.
// Four where every tensor is float32, so that a warp's accesses are contiguous. Corrections may be bytes.
template <class P, class S, class U>
constexpr int kStepWidth = 4 * sizeof(float) / [] {
  constexpr auto kOwnSize = sizeof(typename StepTensors<P, S, U>::Own);
  constexpr auto kWeightSize = kCorrected<P> ? 1 : sizeof(weight_t<P>);
  constexpr auto kSize = kWeightSize < sizeof(S) ? kWeightSize : sizeof(S);
  return kSize < kOwnSize ? kSize : kOwnSize;
}();

template <class P, class S, class U, class Block, class Include>
EPI_KERNEL void step_span(const StepArgs& args, const Span& span, const Block& block,
                          const Include& include) {
  constexpr int kWidth = kStepWidth<P, S, U>;
  if (span.has(kSkipped)) return;         // all threads of the block alike
  constexpr bool kBlocks = kWidth == 16;  // of codes: units go to whole warps, and are 16 long everywhere
  constexpr int kStride = kBlocks ? kWarp : 1;  // units are handed out so many at a time
  constexpr int kRestWidth = kBlocks ? kWidth : 1;
  StepTensors<P, S, U> tensors(span);
  const RandomStream random(span);
  auto constants = math::step_constants<float>(args.scalars + span.row_index * math::kStepScalars);
  if constexpr (kNibbles<S>) {
    tensors.bound = math::moment_bound(constants.beta1, constants.one_minus_beta1, constants.beta2,
                                       constants.one_minus_beta2);
  }
  // (1 - beta1) * -g is -(1 - beta1) * g to the bit, and g * g has no sign
  if (span.has(kMaximize)) constants.one_minus_beta1 = -constants.one_minus_beta1;
  const float multiplier = args.grad_multiplier != nullptr ? *args.grad_multiplier : 1.0f;
  int64_t begin = span.begin;
  if (span.has(kAligned)) {
    const int64_t whole = (span.end - begin) / (kWidth * kStride) * kStride;
#pragma unroll 1
    for (int64_t i = block.thread(); i < whole; i += block.threads()) {
      update<kWidth, true>(block, tensors, constants, args, multiplier, random, begin + i * kWidth, kWidth,
                           include);
    }
    begin += whole * kWidth;
  }
  constexpr int kTile = kRestWidth * kStride;
  const int64_t rest = (span.end - begin + kTile - 1) / kTile * kStride;
#pragma unroll 1
  for (int64_t i = block.thread(); i < rest; i += block.threads()) {
    const int64_t start = begin + i * kRestWidth, left = span.end - start;
    const int count = left >= kRestWidth ? kRestWidth : static_cast<int>(left > 0 ? left : 0);
    update<kRestWidth, false>(block, tensors, constants, args, multiplier, random, start, count, include);
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
