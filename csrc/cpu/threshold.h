// Stage 3, threshold: counts scores into a histogram of the bracket. A score costs a division, a
// bound on u a comparison: only elements between the bracket's two bounds have their score computed.

#pragma once

#include "cpu/code_blocks.h"
#include "math/score.h"

namespace epi::EPI_ISA {

// The bracket as bounds on u, for one vector of elements.
template <class F>
struct Bracket {
  F lo, hi;
};

template <class F>
struct Brackets {
  Bracket<F> released, isolated;
  bool by_old_bit;

  EPI_INLINE Bracket<F> of(typename Lanes<F>::M old) const {
    if (!by_old_bit) return released;
    return {select(old, isolated.lo, released.lo), select(old, isolated.hi, released.hi)};
  }
};

// Adds the elements of `u` that lie inside the bracket to their bins, and notes their keys. In a narrow
// bracket they are rarely two at a time: those are scored one by one.
constexpr int kFew = 2;
template <class F>
EPI_INLINE void add_few_to_bins(F u, uint32_t inside, uint32_t isolated, const ScoreTerms& terms,
                                const CountArguments& a) {
  float values[kWidth];
  store(values, u);
  for (; inside != 0; inside &= inside - 1) {
    const int j = __builtin_ctz(inside);
    const uint32_t key = ordered_key(score(values[j], terms, (isolated >> j & 1) != 0));
    ++a.histogram[(key - a.lo) >> a.bin_shift];
    if (a.noted == nullptr) continue;
    if (a.noted->size < a.noted->capacity) {
      a.noted->keys[a.noted->size++] = key;
    } else {
      a.noted->overflowed = true;
    }
  }
}

template <class F>
__attribute__((noinline)) void add_to_bins(F u, uint32_t inside, typename Lanes<F>::M isolated,
                                           const CountArguments& a) {
  using L = Lanes<F>;
  const ScoreTerms terms{a.shift, a.scale, a.keep_factor};
  if (__builtin_popcount(inside) <= kFew) return add_few_to_bins(u, inside, to_bits(isolated), terms, a);
  const auto key = ordered_key(score(u, terms, isolated));
  uint32_t bins[kWidth];
  store(bins, (key - L::u32(a.lo)) >> a.bin_shift);
  for (uint32_t left = inside; left != 0; left &= left - 1) ++a.histogram[bins[__builtin_ctz(left)]];
  if (a.noted == nullptr) return;
  if (a.noted->size + kWidth > a.noted->capacity) {
    a.noted->overflowed = true;
    return;
  }
  uint32_t keys[kWidth];
  store(keys, key);
  for (; inside != 0; inside &= inside - 1) a.noted->keys[a.noted->size++] = keys[__builtin_ctz(inside)];
}

// Sixteen elements: counts those at or above the bracket's end, lane by lane, into `above`.
template <class F>
EPI_INLINE void count_lanes(F u, uint32_t old_bits, typename Lanes<F>::M in_bounds,
                            const Brackets<F>& brackets, const CountArguments& a,
                            typename Lanes<F>::U& above) {
  using L = Lanes<F>;
  using M = typename L::M;
  const M isolated = from_bits<M>(old_bits);
  const Bracket<F> bracket = brackets.of(isolated);
  // NaN compares false, +inf is cut off here, -inf lies below every bound
  const M finite = (u < L::f32(float_of(0x7F800000u))) & in_bounds;
  const M over = (u >= bracket.hi) & finite;
  const M inside = (u >= bracket.lo) & !over & finite;
  above = increment(above, over);
  if (any(inside)) [[unlikely]]
    add_to_bins(u, to_bits(inside), isolated, a);
}

template <class F, class T>
EPI_INLINE void count_span(const T* u, const uint8_t* mask, int64_t start, int64_t stop,
                           const Brackets<F>& brackets, const CountArguments& a,
                           typename Lanes<F>::U& above) {
  using M = typename Lanes<F>::M;
  const M all = from_bits<M>(0xFFFFu);
  int64_t i = start;
  for (; i + kWidth <= stop; i += kWidth) {
    ahead<kWidth>(u + i, kReadAhead);
    count_lanes(load<F>(u + i), mask_word<uint16_t>(mask, i), all, brackets, a, above);
  }
  if (i < stop) {
    const int count = static_cast<int>(stop - i);
    T rest[kWidth];
    count_lanes(load<F>(padded(rest, u + i, count)), mask_bits(mask, i, count),
                from_bits<M>((1u << count) - 1), brackets, a, above);
  }
}

// The same for bfloat16 and positive bounds, without widening: bits of thirty-two words at a time.
struct WordBrackets {
  int lo[2], hi[2];  // [1]: isolated elements
  bool by_old_bit;
};

template <class F>
EPI_INLINE int64_t count_words(const uint16_t* u, const uint8_t* mask, int64_t start, int64_t stop,
                               const WordBrackets& b, const CountArguments& a) {
  int64_t above = 0;
  for (int64_t i = start; i < stop; i += 2 * kWidth) {
    const int count = stop - i < 2 * kWidth ? static_cast<int>(stop - i) : 2 * kWidth;
    uint16_t rest[2 * kWidth];
    const uint16_t* at = u + i;
    ahead<2 * kWidth>(at, kReadAhead);
    uint32_t in_bounds = ~0u, old = 0;
    if (count < 2 * kWidth) [[unlikely]] {
      for (int j = 0; j < 2 * kWidth; ++j) rest[j] = j < count ? at[j] : uint16_t{0};
      at = rest;
      in_bounds = (1u << count) - 1;
    }
    if (b.by_old_bit) old = count == 2 * kWidth ? mask_word(mask, i) : mask_bits(mask, i, count);
    const uint32_t over = finite_from(at, b.hi, old) & in_bounds;
    const uint32_t in = finite_from(at, b.lo, old) & in_bounds & ~over;
    above += __builtin_popcount(over);
    if (in != 0) [[unlikely]] {
      using M = typename Lanes<F>::M;
      for (int j = 0; j < 2; ++j) {
        const uint32_t half = (in >> kWidth * j) & 0xFFFFu;
        if (half == 0) continue;
        add_to_bins(load<F>(at + kWidth * j), half, from_bits<M>(old >> kWidth * j), a);
      }
    }
  }
  return above;
}

// The same for codes: a block's are compared as they are.
template <class F, class Codes>
EPI_INLINE int64_t count_codes(const Codes& u, const uint8_t* mask, int64_t start, int64_t stop,
                               const CountArguments& a) {
  using L = Lanes<F>;
  int64_t above = 0;
  for (int64_t i = start; i < stop; i += kCodeBlock) {
    const int count = stop - i < kCodeBlock ? static_cast<int>(stop - i) : kCodeBlock;
    uint8_t space[kCodeBlock];
    const auto block = u.block(i, count, space);
    if (!block.finite()) continue;
    uint64_t in_bounds = ~uint64_t{0}, old = 0;
    if (count < kCodeBlock) [[unlikely]]
      in_bounds = (uint64_t{1} << count) - 1;
    uint64_t over = block.from(a.hi_bound[0]), in = block.from(a.lo_bound[0]);
    if (mask != nullptr) {
      old = count == kCodeBlock ? mask_word<uint64_t>(mask, i) : mask_bits<uint64_t>(mask, i, count);
      if (old != 0) {
        over = (block.from(a.hi_bound[1]) & old) | (over & ~old);
        in = (block.from(a.lo_bound[1]) & old) | (in & ~old);
      }
    }
    above += __builtin_popcountll(over & in_bounds);
    in &= in_bounds & ~over;
    for (int j = 0; in >> j != 0; j += kWidth) {
      const uint32_t part = static_cast<uint32_t>(in >> j) & 0xFFFFu;
      if (part != 0) {
        const F values = block.template values<F>(j);
        add_to_bins(values, part, from_bits<typename L::M>(static_cast<uint32_t>(old >> j) & 0xFFFFu), a);
      }
      if (j + kWidth == kCodeBlock) break;
    }
  }
  return above;
}

// Sampled blocks asked for ahead (Zen 4, two threads: of one ahead a sample of 1e8 takes twice as long).
constexpr int64_t kSamplesAhead = 8;

// Calls visit(start, stop) for what is to be counted of a range: all of it, or every sample_stride-th block.
// `address(i)`: where an element lies; `bits`: of one; `mask`: nullptr, or read beside it.
template <class Address, class Visit>
EPI_INLINE void for_each_counted(int64_t start, int64_t stop, int bits, const uint8_t* mask,
                                 const CountArguments& a, const Address& address, const Visit& visit) {
  if (a.sample_stride <= 1) return visit(start, stop);
  const int64_t pace = kSampleBlock * a.sample_stride;
  for (int64_t i = (start + pace - 1) / pace * pace; i < stop; i += pace) {
    // a block may lie on a page of its own, which no hardware asks for
    const int64_t later = i + kSamplesAhead * pace;
    const char* next = static_cast<const char*>(address(later));
    for (int j = 0; j < kSampleBlock * bits / 8; j += 64) __builtin_prefetch(next + j);
    if (mask != nullptr) __builtin_prefetch(mask + later / 8);
    visit(i, i + kSampleBlock < stop ? i + kSampleBlock : stop);
  }
}

template <class F, class Codes>
EPI_INLINE void count_coded_range(const Codes& u, int bits, TableRow row, int64_t start, int64_t stop,
                                  const CountArguments& a) {
  const uint8_t* mask = a.keep_factor != 1.0f ? pointer<const uint8_t>(row, kIsolationMask) : nullptr;
  for_each_counted(
      start, stop, bits, mask, a, [&](int64_t i) __attribute__((always_inline)) { return u.address(i); },
      [&](int64_t i, int64_t end)
          __attribute__((always_inline)) { a.histogram[a.last_bin] += count_codes<F>(u, mask, i, end, a); });
}

template <class F, class T>
EPI_INLINE void count_range(TableRow row, int64_t start, int64_t stop, const CountArguments& a) {
  using L = Lanes<F>;
  const T* u = importances<T>(row);
  const uint8_t* mask = a.keep_factor != 1.0f ? pointer<const uint8_t>(row, kIsolationMask) : nullptr;
  const Brackets<F> brackets{{L::f32(a.lo_bound[0]), L::f32(a.hi_bound[0])},
                             {L::f32(a.lo_bound[1]), L::f32(a.hi_bound[1])},
                             mask != nullptr};
  [[maybe_unused]] const WordBrackets words{{bf16_bound(a.lo_bound[0]), bf16_bound(a.lo_bound[1])},
                                            {bf16_bound(a.hi_bound[0]), bf16_bound(a.hi_bound[1])},
                                            mask != nullptr};
  [[maybe_unused]] const bool positive = a.lo_bound[0] > 0.0f && (mask == nullptr || a.lo_bound[1] > 0.0f);
  auto above = L::u32(0);
  for_each_counted(
      start, stop, 8 * sizeof(T), mask, a,
      [&](int64_t i) __attribute__((always_inline)) { return static_cast<const void*>(u + i); },
      [&](int64_t i, int64_t end) __attribute__((always_inline)) {
        if constexpr (sizeof(T) == 2) {
          if (positive) {
            a.histogram[a.last_bin] += count_words<F>(u, mask, i, end, words, a);
            return;
          }
        }
        count_span(u, mask, i, end, brackets, a, above);
      });
  uint32_t lanes[kWidth];
  store(lanes, above);
  for (const uint32_t n : lanes) a.histogram[a.last_bin] += n;
}

template <class F>
void count(TableRow row, int64_t start, int64_t stop, const CountArguments& a) {
  if ((row[kFlags] & kUInt8) != 0) {
    count_coded_range<F>(byte_codes(row), 8, row, start, stop, a);
  } else if ((row[kFlags] & kUInt4) != 0) {
    count_coded_range<F>(nibble_codes(row), 4, row, start, stop, a);
  } else if ((row[kFlags] & kUBf16) != 0) {
    count_range<F, uint16_t>(row, start, stop, a);
  } else {
    count_range<F, float>(row, start, stop, a);
  }
}

}  // namespace epi::EPI_ISA
