// Stage 2, stats: extrema, moments and non-finite values of importances as stored.

#pragma once

#include "cpu/code_blocks.h"
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

// `n`: a multiple of kWords, as many as are taken at once.
constexpr int kWords = 32;
template <class F>
__attribute__((noinline)) void add_extrema(StatsSums<F>& sums, const float* u, int64_t n) {
  const float infinity = float_of(0x7F800000u);
  const F none_below = Lanes<F>::f32(infinity), none_above = Lanes<F>::f32(-infinity);
  F minimum = sums.minimum, maximum = sums.maximum;
  int64_t finite = 0;
  for (int64_t i = 0; i < n; i += kWidth) {
    ahead<kWidth>(u + i, kReadAhead);
    const F x = load<F>(u + i);
    const auto good = is_finite(x);
    minimum = min(minimum, select(good, x, none_below));
    maximum = max(maximum, select(good, x, none_above));
    finite += __builtin_popcount(to_bits(good));
  }
  sums.minimum = minimum;
  sums.maximum = maximum;
  sums.nonfinite += n - finite;
}
template <class F>
__attribute__((noinline)) void add_extrema(StatsSums<F>& sums, const uint16_t* u, int64_t n) {
  WordExtrema words = sums.words;
  int64_t finite = 0;
  for (int64_t i = 0; i < n; i += kWords) {
    ahead<kWords>(u + i, kReadAhead);
    finite += add_words(words, u + i);
  }
  sums.words = words;
  sums.nonfinite += n - finite;
}

// Moments of the finite values; kFinite: all of them are. Lane i takes the elements with position % 16 == i,
// and a zero adds nothing.
template <bool kFinite, class F, class T>
__attribute__((noinline)) void add_moments_of(StatsSums<F>& sums, const T* u, int64_t n) {
  D16 sum = sums.sum, sum_of_squares = sums.sum_of_squares;
  for (int64_t i = 0; i < n; i += kWidth) {
    const F x = load<F>(u + i);
    add_moments(sum, sum_of_squares, kFinite ? x : select(is_finite(x), x, Lanes<F>::f32(0.0f)));
  }
  sums.sum = sum;
  sums.sum_of_squares = sum_of_squares;
}

template <class F, class T>
EPI_INLINE void add_whole_words(StatsSums<F>& sums, const T* u, int64_t n, bool moments) {
  if (!moments) return add_extrema(sums, u, n);
  for (int64_t i = 0; i < n; i += kBlock) {  // the second reading is from the first cache
    const int64_t count = n - i < kBlock ? n - i : kBlock, nonfinite = sums.nonfinite;
    add_extrema(sums, u + i, count);
    sums.nonfinite == nonfinite ? add_moments_of<true>(sums, u + i, count)
                                : add_moments_of<false>(sums, u + i, count);
  }
}

EPI_INLINE float infinity_of(const float*) {
  return float_of(0x7F800000u);
}
EPI_INLINE uint16_t infinity_of(const uint16_t*) {
  return kBfloat16Infinity;
}
template <class F, class T>
EPI_INLINE void add_range(StatsSums<F>& sums, const T* u, int64_t n, bool moments) {
  const int64_t whole = n / kWords * kWords;
  add_whole_words(sums, u, whole, moments);
  if (whole == n) return;
  T rest[kWords];  // what is no number of the range is not finite, and not counted
  add_whole_words(sums, padded(rest, u + whole, static_cast<int>(n - whole), infinity_of(u)), kWords,
                  moments);
  sums.nonfinite -= whole + kWords - n;
}

// Importances that are codes. A block's extrema are those of its codes.
EPI_INLINE CodeExtrema code_extrema(const uint8_t* codes, int n) {
  if (n == kCodeBlock) return code_extrema(codes);
  CodeExtrema e{codes[0], codes[0]};
  for (int i = 1; i < n; ++i) {
    e.low = codes[i] < e.low ? codes[i] : e.low;
    e.high = codes[i] > e.high ? codes[i] : e.high;
  }
  return e;
}

// Elements start to stop; `start` is a multiple of 64.
template <class F, class Codes>
__attribute__((noinline)) void add_codes(StatsSums<F>& sums, const Codes& u, int64_t start, int64_t stop,
                                         bool moments) {
  using L = Lanes<F>;
  const float infinity = float_of(0x7F800000u);
  float minimum = infinity, maximum = -infinity;
  D16 sum = sums.sum, sum_of_squares = sums.sum_of_squares;
  for (int64_t i = start; i < stop; i += kCodeBlock) {
    const int count = stop - i < kCodeBlock ? static_cast<int>(stop - i) : kCodeBlock;
    uint8_t space[kCodeBlock];
    const auto block = u.block(i, count, space);
    if (!block.finite()) {
      sums.nonfinite += count;
      continue;
    }
    const CodeExtrema e = code_extrema(block.codes, count);
    const float low = block.value(e.low), high = block.value(e.high);
    minimum = low < minimum ? low : minimum;
    maximum = high > maximum ? high : maximum;
    for (int j = 0; moments && j < count; j += kWidth) {
      add_moments(sum, sum_of_squares, block.template values<F>(j));
    }
  }
  sums.minimum = min(sums.minimum, L::f32(minimum));
  sums.maximum = max(sums.maximum, L::f32(maximum));
  sums.sum = sum;
  sums.sum_of_squares = sum_of_squares;
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
    add_codes(sums, byte_codes(row), start, stop, moments);
  } else if ((row[kFlags] & kUInt4) != 0) {
    add_codes(sums, nibble_codes(row), start, stop, moments);
  } else if ((row[kFlags] & kUBf16) != 0) {
    add_range(sums, importances<uint16_t>(row) + start, stop - start, moments);
  } else {
    add_range(sums, importances<float>(row) + start, stop - start, moments);
  }
  *partial = reduce(sums);
}

}  // namespace epi::EPI_ISA
