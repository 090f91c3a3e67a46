// Stage 2, stats: extrema, moments and non-finite values of importances as stored.

#pragma once

#include "cpu/rows.h"

namespace epi::EPI_ISA {

template <class F>
struct StatsSums {
  F minimum, maximum;
  D16 sum, sum_of_squares;
  int64_t nonfinite;
};

template <class F>
EPI_INLINE StatsSums<F> empty_sums() {
  const float infinity = float_of(0x7F800000u);
  return {Lanes<F>::f32(infinity), Lanes<F>::f32(-infinity), zero_d16(), zero_d16(), 0};
}

template <class F>
EPI_INLINE void add_lanes(StatsSums<F>& sums, F u, typename Lanes<F>::M in_bounds, int count, bool moments) {
  using L = Lanes<F>;
  const auto good = is_finite(u) & in_bounds;
  const float infinity = float_of(0x7F800000u);
  sums.minimum = min(sums.minimum, select(good, u, L::f32(infinity)));
  sums.maximum = max(sums.maximum, select(good, u, L::f32(-infinity)));
  sums.nonfinite += count - __builtin_popcount(to_bits(good));
  if (moments) add_moments(sums.sum, sums.sum_of_squares, select(good, u, L::f32(0.0f)));
}

template <class F, class T>
__attribute__((noinline)) void add_range(StatsSums<F>& sums, const T* u, int64_t n, bool moments) {
  using M = typename Lanes<F>::M;
  StatsSums<F> local = sums;
  const M all = from_bits<M>(0xFFFFu);
  int64_t i = 0;
  if (!moments) {
    for (; i + kWidth <= n; i += kWidth) add_lanes(local, load<F>(u + i), all, kWidth, false);
  }
  for (; i < n; i += kWidth) {
    const int count = n - i < kWidth ? static_cast<int>(n - i) : kWidth;
    T rest[kWidth];
    const T* at = count < kWidth ? padded(rest, u + i, count) : u + i;
    add_lanes(local, load<F>(at), from_bits<M>((1u << count) - 1), count, moments);
  }
  sums = local;
}

// Lanes are combined in one fixed order.
template <class F>
EPI_INLINE StatsPartial reduce(const StatsSums<F>& sums) {
  float low[kWidth], high[kWidth];
  double sum[kWidth], squares[kWidth];
  store(low, sums.minimum);
  store(high, sums.maximum);
  store(sum, sums.sum);
  store(squares, sums.sum_of_squares);
  StatsPartial partial{low[0], high[0], sums.nonfinite, sum[0], squares[0]};
  for (int i = 1; i < kWidth; ++i) {
    partial.minimum = low[i] < partial.minimum ? low[i] : partial.minimum;
    partial.maximum = high[i] > partial.maximum ? high[i] : partial.maximum;
    partial.sum += sum[i];
    partial.sum_of_squares += squares[i];
  }
  return partial;
}

template <class F>
void stats(TableRow row, int64_t start, int64_t stop, bool moments, StatsPartial* partial) {
  StatsSums<F> sums = empty_sums<F>();
  if ((row[kFlags] & kUBf16) != 0) {
    add_range(sums, importances<uint16_t>(row) + start, stop - start, moments);
  } else {
    add_range(sums, importances<float>(row) + start, stop - start, moments);
  }
  *partial = reduce(sums);
}

}  // namespace epi::EPI_ISA
