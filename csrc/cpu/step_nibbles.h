// Stage 1 where exp_avg and exp_avg_sq are 4-bit codes: as with 8-bit ones (step_codes.h), but an exp_avg is
// coded in units of its exp_avg_sq's code, which is therefore written first. Four loops over kBlock elements:
// moments, second moments, first moments, weights.

#pragma once

#include "cpu/step_codes.h"
#include "math/nibbles.h"

namespace epi::EPI_ISA {

constexpr float kMagnitudes[16] = {0.0f,  1.0f,  2.0f,  3.0f,  4.0f,  6.0f,  8.0f,  12.0f,
                                   -0.0f, -1.0f, -2.0f, -3.0f, -4.0f, -6.0f, -8.0f, -12.0f};

constexpr float kRoots[16] = {EPI_ROOTS};
struct InverseRoots {
  float of[16];
  constexpr InverseRoots() : of() {
    for (int code = 0; code < 16; ++code) of[code] = 1.0f / kRoots[code];
  }
};
constexpr InverseRoots kInverseRoots;

// Where a block's tensors lie: exp_avg and exp_avg_sq packed.
template <class P>
struct NibblePointers : StepPointers<P, uint8_t> {
  uint16_t* exp_avg_scale;
  uint16_t* exp_avg_sq_scale;

  EPI_INLINE void prefetch(int64_t i) const {
    ahead<kCodeBlock>(this->param + i), ahead<kCodeBlock>(this->grad + i);
    ahead<kCodeBlock / 2>(this->exp_avg + i / 2), ahead<kCodeBlock / 2>(this->exp_avg_sq + i / 2);
  }
};

template <class P>
EPI_INLINE NibblePointers<P> nibble_pointers(TableRow row) {
  return {step_pointers<P, uint8_t>(row), pointer<uint16_t>(row, kExpAvgScale),
          pointer<uint16_t>(row, kExpAvgSqScale)};
}

// The last, incomplete block, as in CodedTail.
template <class P>
struct NibbleTail {
  StepTail<P, uint8_t, kCodeBlock, false> others;
  uint8_t exp_avg[kCodeBlock / 2] = {}, exp_avg_sq[kCodeBlock / 2] = {};

  NibblePointers<P> load(const NibblePointers<P>& p, int64_t i, int count) {
    const int64_t block = i / kCodeBlock;
    NibblePointers<P> here{others.load(p, i, count), p.exp_avg_scale + block, p.exp_avg_sq_scale + block};
    copy(here.exp_avg = exp_avg, p.exp_avg + i / 2, (count + 1) / 2);
    copy(here.exp_avg_sq = exp_avg_sq, p.exp_avg_sq + i / 2, (count + 1) / 2);
    return here;
  }
  void store(const NibblePointers<P>& p, int64_t i, int count, bool with_grad) {
    others.store(p, i, count, with_grad);
    if (count % 2 != 0) exp_avg[count / 2] &= 15, exp_avg_sq[count / 2] &= 15;  // padding
    copy(p.exp_avg + i / 2, exp_avg, (count + 1) / 2);
    copy(p.exp_avg_sq + i / 2, exp_avg_sq, (count + 1) / 2);
  }
};

struct NibbleValues : NewMoments {
  alignas(64) float exp_avg_sq[kBlock];
  alignas(64) float scaled[kBlock];  // |exp_avg| in units of its second moment's code
};

EPI_INLINE float scale_of(const uint16_t* scale) {
  return float_of(static_cast<uint32_t>(*scale) << 16);
}

// The pair of elements from `i` on, whose new values lie at position `k`. `key`, `at`: as in step_codes.h.
// `top`: the largest second moments, lane by lane.
template <bool kStochastic, class P>
EPI_INLINE void nibble_moments_of_pair(const StepContext& x, const NibblePointers<P>& p, Pair average,
                                       Pair square, int64_t i, int64_t k, StepU key, int64_t at,
                                       NibbleValues& next, StepU& top) {
  const Pair g = load_grad<true>(x, p.grad + i), g2 = g * g;
  const PairU square_code = load_nibbles(p.exp_avg_sq + i / 2);
  const Pair units = lookup(kMagnitudes, load_nibbles(p.exp_avg + i / 2)) * average;
  const Pair m = exp_avg_ema(x.c, units * lookup(kRoots, square_code), g);
  const Pair v = exp_avg_sq_ema(x.c, lookup(kLevels, square_code) * square, g2);
  put(next.exp_avg + k, m);
  put(next.exp_avg_sq + k, v);
  top = top_of<false>(top, v);
  if constexpr (kStochastic) {
    PairWord w0{mix_folded<Pair>(twice(key) ^ positions(k % kCodeBlock))};
    if (!x.keys.blocks_aligned()) [[unlikely]]
      w0 = word0_of_any(x.keys, at);
    put(next.random + k, float_of(w0.word()));
  }
}

// A block's new second moments in memory, what m is divided by, and m in its units in `scaled`. `top`: the
// largest of those, lane by lane.
template <bool kStochastic>
EPI_INLINE void square_codes_of_pair(const StepContext& x, uint8_t* codes, Pair gain, int64_t k,
                                     NibbleValues& next, float* scaled, StepU& top) {
  const Pair v = load_in_order(next.exp_avg_sq + k);
  PairU random = Lanes<Pair>::u32(kNearestSquare);
  if constexpr (kStochastic) {
    const PairU word0 = bits_of(load_in_order(next.random + k));
    random = random_word1<Pair>(word0, Lanes<Pair>::u32(kGolden)).word() & Lanes<Pair>::u32(0x7FFFFFu);
  }
  const PairU code = square_code(v, gain, random);
  store_nibbles(codes, code.a, code.b);
  put(next.denom + k, denominator(x.c, v));
  const PairU word = bits_of(load_in_order(next.exp_avg + k)) & Lanes<Pair>::u32(kMagnitude);
  const Pair magnitude = float_of(word) * lookup(kInverseRoots.of, code);
  put(scaled, magnitude);
  top = top_of<false>(top, magnitude);
}

template <bool kStochastic>
EPI_INLINE void average_codes_of_pair(uint8_t* codes, Pair inverse, int64_t k, const NibbleValues& next,
                                      const float* scaled) {
  PairU random = Lanes<Pair>::u32(kNearest);
  if constexpr (kStochastic) random = bits_of(load_in_order(next.random + k)) >> 16;
  const PairU code = average_code(load_in_order(next.exp_avg + k), load_in_order(scaled), inverse, random);
  store_nibbles(codes, code.a, code.b);
}

// What of a block is known before its codes are: chains of divisions and roots, which eight blocks take side
// by side.
struct NibbleBlockState {
  StepU top;  // of the second moments, then of the scaled first ones, lane by lane
  SquareGrid square;
  AverageGrid average;
};

// A block's second moments in memory; `first`: its place in `next`.
template <bool kStochastic>
EPI_INLINE void store_square_codes(const StepContext& x, uint8_t* codes, int64_t first,
                                   NibbleBlockState& block, NibbleValues& next) {
  using L = Lanes<Pair>;
  block.top = Lanes<StepF>::u32(0);
#pragma GCC unroll 1
  for (int k = 0; k < kCodeBlock; k += kPair) {
    square_codes_of_pair<kStochastic>(x, codes + k / 2, L::f32(block.square.gain), first + k, next,
                                      next.scaled + first + k, block.top);
  }
  if (block.square.scale != kInfiniteScale) [[likely]]
    return;
  memset(codes, 0xFF, kCodeBlock / 2);  // 15 is the code of all
  block.top = Lanes<StepF>::u32(0);
  for (int64_t k = first; k < first + kCodeBlock; k += kPair) {
    const PairU word = bits_of(load_in_order(next.exp_avg + k)) & L::u32(kMagnitude);
    const Pair magnitude = float_of(word) * L::f32(kInverseRoots.of[15]);
    put(next.scaled + k, magnitude);
    block.top = top_of<false>(block.top, magnitude);
  }
}
template <bool kStochastic>
EPI_INLINE void store_average_codes(uint8_t* codes, int64_t first, const NibbleBlockState& block,
                                    const NibbleValues& next) {
  const Pair inverse = Lanes<Pair>::f32(block.average.inverse);
#pragma GCC unroll 1
  for (int k = 0; k < kCodeBlock; k += kPair) {
    average_codes_of_pair<kStochastic>(codes + k / 2, inverse, first + k, next, next.scaled + first + k);
  }
  if (block.average.scale == kNaNScale) [[unlikely]]
    memset(codes, 0, kCodeBlock / 2);
}

// The codes and scales of `n` elements from `i` on, whole blocks, whose second moments' largest are in
// `state`.
template <bool kStochastic, class P>
EPI_INLINE void store_nibble_blocks(const StepContext& x, const NibblePointers<P>& p, int64_t i, int n,
                                    float bound, NibbleBlockState* state, NibbleValues& next) {
  const int64_t block = i / kCodeBlock;
  const int blocks = n / kCodeBlock;
  for (int b = 0; b < blocks; ++b) {
    uint16_t* const scale = p.exp_avg_sq_scale + block + b;
    state[b].square = square_grid(largest(state[b].top) & kMagnitude, bits_of(scale_of(scale)));
    *scale = static_cast<uint16_t>(state[b].square.scale >> 16);
  }
  for (int b = 0; b < blocks; ++b) {
    const int64_t first = b * kCodeBlock;
    store_square_codes<kStochastic>(x, p.exp_avg_sq + (i + first) / 2, first, state[b], next);
  }
  for (int b = 0; b < blocks; ++b) {
    state[b].average = average_grid(largest(state[b].top) & kMagnitude, bound, state[b].square.scale);
    p.exp_avg_scale[block + b] = static_cast<uint16_t>(state[b].average.scale >> 16);
  }
  for (int b = 0; b < blocks; ++b) {
    const int64_t first = b * kCodeBlock;
    store_average_codes<kStochastic>(p.exp_avg + (i + first) / 2, first, state[b], next);
  }
}

// The elements from `i` on, `n` of them, whole blocks. `mask`: their packed bits; `at`: the first one
// in the range.
template <bool kStochastic, class P>
EPI_INLINE void step_nibble_blocks(const StepContext& x, const NibblePointers<P>& p, int64_t i, int n,
                                   const uint8_t* mask, int64_t at, float bound, NibbleValues& next) {
  NibbleBlockState state[kBlock / kCodeBlock];
  for (int64_t b = 0; b < n; b += kCodeBlock) {
    p.prefetch(i + b);
    const int64_t block = (i + b) / kCodeBlock;
    const Pair average = Lanes<Pair>::f32(scale_of(p.exp_avg_scale + block));
    const Pair square = Lanes<Pair>::f32(scale_of(p.exp_avg_sq_scale + block));
    const StepU key = x.keys.folded(at + b);
    StepU top = Lanes<StepF>::u32(0);
#pragma GCC unroll 1
    for (int64_t k = b; k < b + kCodeBlock; k += kPair) {
      nibble_moments_of_pair<kStochastic>(x, p, average, square, i + k, k, key, at + k, next, top);
    }
    state[b / kCodeBlock].top = top;
  }
  store_nibble_blocks<kStochastic>(x, p, i, n, bound, state, next);
  weights_of_pairs<kStochastic, uint8_t>(x, p, i, n, mask, next);
}

template <class P, bool kStochastic>
void step_nibble_range(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  const StepContext x = step_context(row, start, a);
  const uint8_t* mask = pointer<const uint8_t>(row, kIsolationMask);
  const NibblePointers<P> p = nibble_pointers<P>(row);
  const float bound = moment_bound(a.scalars[0], a.scalars[1], a.scalars[2], a.scalars[3]);
  StatsSums<F16> sums = empty_sums<F16>();
  NibbleValues next;
  for (int64_t i = start; i < stop; i += kBlock) {
    const int n = stop - i < kBlock ? static_cast<int>(stop - i) : kBlock;
    const int whole = n / kCodeBlock * kCodeBlock;
    step_nibble_blocks<kStochastic>(x, p, i, whole, mask, i - start, bound, next);
    if (whole < n) [[unlikely]] {
      const int64_t at = i + whole;
      NibbleTail<P> tail;
      const uint64_t isolated = mask_bits<uint64_t>(mask, at, n - whole);
      step_nibble_blocks<kStochastic>(x, tail.load(p, at, n - whole), 0, kCodeBlock,
                                      reinterpret_cast<const uint8_t*>(&isolated), at - start, bound, next);
      tail.store(p, at, n - whole, a.has_grad_multiplier);
    }
    if (a.stats != nullptr) add_codes(sums, nibble_codes(row), i, i + n, a.moments);
  }
  if (a.stats != nullptr) *a.stats = reduce(sums);
}

template <class P>
void step_nibbles_of(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  a.stochastic_rounding ? step_nibble_range<P, true>(row, start, stop, a)
                        : step_nibble_range<P, false>(row, start, stop, a);
}

inline void step_nibbles(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  (row[kFlags] & kParamBf16) != 0 ? step_nibbles_of<uint16_t>(row, start, stop, a)
                                  : step_nibbles_of<float>(row, start, stop, a);
}

}  // namespace epi::EPI_ISA
