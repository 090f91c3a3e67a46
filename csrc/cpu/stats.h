// Stage 2, stats: extrema, moments and non-finite values of importances as stored.

#pragma once

#include "cpu/rows.h"
#include "math/codec.h"
#include "math/rounding.h"

namespace epi::EPI_ISA {

template <class F>
struct StatsSums {
  F minimum, maximum;
  D16 sum, sum_of_squares;
  int64_t nonfinite;
  WordExtrema words;  // of bfloat16 importances, which are compared as they are
};

template <class F>
EPI_INLINE StatsSums<F> empty_sums() {
  const float infinity = float_of(0x7F800000u);
  return {Lanes<F>::f32(infinity), Lanes<F>::f32(-infinity), zero_d16(), zero_d16(), 0, no_words()};
}

template <bool kMoments, class F>
EPI_INLINE void add_lanes(StatsSums<F>& sums, F u, typename Lanes<F>::M in_bounds, int count) {
  using L = Lanes<F>;
  const auto good = is_finite(u) & in_bounds;
  const float infinity = float_of(0x7F800000u);
  sums.minimum = min(sums.minimum, select(good, u, L::f32(infinity)));
  sums.maximum = max(sums.maximum, select(good, u, L::f32(-infinity)));
  sums.nonfinite += count - __builtin_popcount(to_bits(good));
  if constexpr (kMoments) add_moments(sums.sum, sums.sum_of_squares, select(good, u, L::f32(0.0f)));
}

template <bool kMoments, class F, class T>
__attribute__((noinline)) void add_values(StatsSums<F>& sums, const T* u, int64_t n) {
  using M = typename Lanes<F>::M;
  StatsSums<F> local = sums;
  const M all = from_bits<M>(0xFFFFu);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) add_lanes<kMoments>(local, load<F>(u + i), all, kWidth);
  if (i < n) {
    const int count = static_cast<int>(n - i);
    T rest[kWidth];
    const M in_bounds = from_bits<M>((1u << count) - 1);
    add_lanes<kMoments>(local, load<F>(padded(rest, u + i, count)), in_bounds, count);
  }
  sums = local;
}

template <class F>
__attribute__((noinline)) void add_word_range(StatsSums<F>& sums, const uint16_t* u, int64_t n) {
  WordExtrema local = sums.words;
  int64_t finite = 0, i = 0;
  for (; i + 32 <= n; i += 32) finite += add_words(local, u + i);
  if (i < n) {
    uint16_t rest[32];
    for (int j = 0; j < 32; ++j) rest[j] = i + j < n ? u[i + j] : uint16_t{kBfloat16Nan};
    finite += add_words(local, rest);
  }
  sums.nonfinite += n - finite;
  sums.words = local;
}

template <class F>
EPI_INLINE void add_range(StatsSums<F>& sums, const float* u, int64_t n, bool moments) {
  moments ? add_values<true>(sums, u, n) : add_values<false>(sums, u, n);
}
template <class F>
EPI_INLINE void add_range(StatsSums<F>& sums, const uint16_t* u, int64_t n, bool moments) {
  moments ? add_values<true>(sums, u, n) : add_word_range(sums, u, n);
}

// 8-bit importances. Blocks' extrema are those of their codes; where not all of a block is there, or
// moments are wanted, every value is looked at.
template <bool kMoments, class F>
EPI_INLINE void add_decoded(StatsSums<F>& sums, const uint8_t* codes, F factor, int n) {
  using M = typename Lanes<F>::M;
  for (int i = 0; i < n; i += kWidth) {
    const int count = n - i < kWidth ? n - i : kWidth;
    uint8_t rest[kWidth];
    const uint8_t* at = count == kWidth ? codes + i : padded(rest, codes + i, count);
    add_lanes<kMoments>(sums, load_codes_in_order<F>(at) * factor, from_bits<M>((1u << count) - 1), count);
  }
}

template <class F>
__attribute__((noinline)) void add_codes(StatsSums<F>& sums, const uint8_t* codes, const uint8_t* scales,
                                         int64_t n, bool moments) {
  using L = Lanes<F>;
  const float infinity = float_of(0x7F800000u);
  float minimum = infinity, maximum = -infinity;
  for (int64_t i = 0; i < n; i += kCodeBlock) {
    const auto block = Block<false>::of_scale(scales[i / kCodeBlock]);
    const int count = n - i < kCodeBlock ? static_cast<int>(n - i) : kCodeBlock;
    if (!block.finite) {
      sums.nonfinite += count;
    } else if (moments) {
      add_decoded<true>(sums, codes + i, L::f32(block.factor()), count);
    } else if (count < kCodeBlock) {
      add_decoded<false>(sums, codes + i, L::f32(block.factor()), count);
    } else {
      const CodeExtrema e = code_extrema(codes + i);
      const float low = half_of_code<float>(e.low << 19) * block.factor();
      const float high = half_of_code<float>(e.high << 19) * block.factor();
      minimum = low < minimum ? low : minimum;
      maximum = high > maximum ? high : maximum;
    }
  }
  sums.minimum = min(sums.minimum, L::f32(minimum));
  sums.maximum = max(sums.maximum, L::f32(maximum));
}

// The number whose ordered word this is: what add_words() compares.
EPI_INLINE float float_of_ordered(int16_t ordered) {
  const uint16_t word = static_cast<uint16_t>(ordered ^ ((ordered >> 15) & 0x7FFF));
  return float_of(static_cast<uint32_t>(word) << 16);
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
  int16_t low_words[32], high_words[32];
  store(low_words, high_words, sums.words);
  int16_t lowest = low_words[0], highest = high_words[0];
  for (int i = 1; i < 32; ++i) {
    lowest = low_words[i] < lowest ? low_words[i] : lowest;
    highest = high_words[i] > highest ? high_words[i] : highest;
  }
  if (lowest <= highest) {  // some word was finite
    const float least = float_of_ordered(lowest), most = float_of_ordered(highest);
    partial.minimum = least < partial.minimum ? least : partial.minimum;
    partial.maximum = most > partial.maximum ? most : partial.maximum;
  }
  return partial;
}

template <class F>
void stats(TableRow row, int64_t start, int64_t stop, bool moments, StatsPartial* partial) {
  StatsSums<F> sums = empty_sums<F>();
  if ((row[kFlags] & kUInt8) != 0) {
    const uint8_t* scales = importance_scales(row) + start / kCodeBlock;
    add_codes(sums, importances<uint8_t>(row) + start, scales, stop - start, moments);
  } else if ((row[kFlags] & kUBf16) != 0) {
    add_range(sums, importances<uint16_t>(row) + start, stop - start, moments);
  } else {
    add_range(sums, importances<float>(row) + start, stop - start, moments);
  }
  *partial = reduce(sums);
}

}  // namespace epi::EPI_ISA
