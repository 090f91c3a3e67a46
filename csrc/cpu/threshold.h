// Stage 3, threshold: counts scores into a histogram of the bracket. A score costs a division, a
// bound on u a comparison: only elements between the bracket's two bounds have their score computed.

#pragma once

#include "cpu/rows.h"
#include "math/score.h"

namespace epi::EPI_ISA {

template <class F>
struct Bracket {
  F lo[2], hi[2];
};

// Sixteen elements; returns how many lie at or above the bracket's end.
template <class F>
EPI_INLINE int64_t count_lanes(F u, uint32_t isolated_bits, uint32_t in_bounds,
                               const Bracket<F>& bracket, bool by_old_bit,
                               const CountArguments& a) {
  using L = Lanes<F>;
  using M = typename L::M;
  F lo = bracket.lo[0], hi = bracket.hi[0];
  const M isolated = from_bits<M>(isolated_bits);
  if (by_old_bit) {
    lo = select(isolated, bracket.lo[1], lo);
    hi = select(isolated, bracket.hi[1], hi);
  }
  // NaN compares false, +inf is cut off here, -inf lies below every bound
  const M finite = u < L::f32(float_of(0x7F800000u));
  const uint32_t above = to_bits((u >= hi) & finite) & in_bounds;
  uint32_t inside = to_bits((u >= lo) & finite) & in_bounds & ~above;
  if (inside != 0) {
    const auto key = ordered_key(score(u, ScoreTerms{a.shift, a.scale, a.keep_factor}, isolated));
    uint32_t bins[kWidth];
    store(bins, (key - L::u32(a.lo)) >> a.bin_shift);
    for (; inside != 0; inside &= inside - 1) ++a.histogram[bins[__builtin_ctz(inside)]];
  }
  return __builtin_popcount(above);
}

template <class F, class T>
EPI_INLINE int64_t count_span(const T* u, const uint8_t* mask, int64_t start, int64_t stop,
                              const Bracket<F>& bracket, const CountArguments& a) {
  int64_t above = 0;
  const bool by_old_bit = mask != nullptr;
  for (int64_t i = start; i < stop; i += kWidth) {
    const int count = stop - i < kWidth ? static_cast<int>(stop - i) : kWidth;
    T rest[kWidth];
    const T* at = count < kWidth ? padded(rest, u + i, count) : u + i;
    above += count_lanes(load<F>(at), mask_bits(mask, i, count), (1u << count) - 1, bracket,
                         by_old_bit, a);
  }
  return above;
}

template <class F, class T>
EPI_INLINE void count_range(TableRow row, int64_t start, int64_t stop, const CountArguments& a) {
  using L = Lanes<F>;
  const T* u = importances<T>(row);
  const uint8_t* mask =
      a.keep_factor != 1.0f ? pointer<const uint8_t>(row, kIsolationMask) : nullptr;
  const Bracket<F> bracket{{L::f32(a.lo_bound[0]), L::f32(a.lo_bound[1])},
                           {L::f32(a.hi_bound[0]), L::f32(a.hi_bound[1])}};
  int64_t above = 0;
  // without a sample the one span is the range
  const int64_t span = a.sample_stride > 1 ? kSampleBlock : stop - start;
  const int64_t pace = a.sample_stride > 1 ? kSampleBlock * a.sample_stride : span;
  const int64_t first = a.sample_stride > 1 ? (start + pace - 1) / pace * pace : start;
  for (int64_t i = first; i < stop; i += pace) {
    above += count_span(u, mask, i, i + span < stop ? i + span : stop, bracket, a);
  }
  a.histogram[a.last_bin] += above;
}

template <class F>
void count(TableRow row, int64_t start, int64_t stop, const CountArguments& a) {
  if ((row[kFlags] & kUBf16) != 0) {
    count_range<F, uint16_t>(row, start, stop, a);
  } else {
    count_range<F, float>(row, start, stop, a);
  }
}

}  // namespace epi::EPI_ISA
