// Last part of a step: from the new moments of elements to their weights in memory.

#pragma once

#include "cpu/random.h"
#include "math/adamw.h"
#include "math/master.h"

namespace epi::EPI_ISA {

struct StepContext {
  StepConstants<Pair> c;
  Pair multiplier;
  bool has_multiplier;
  RandomKeys keys;
  PairU golden;  // a constant of the random words
};

EPI_INLINE StepContext step_context(TableRow row, int64_t start, const StepArguments& a) {
  using L = Lanes<Pair>;
  StepContext x{step_constants<Pair>(a.scalars), L::f32(a.grad_multiplier), a.has_grad_multiplier,
                random_keys(row, start), twice(kept(Lanes<StepF>::u32(kGolden)))};
  // c * (-g) == (-c) * g to the bit, and g * g never sees the sign
  if ((row[kFlags] & kMaximize) != 0) x.c.one_minus_beta1 = L::f32(-a.scalars[1]);
  return x;
}

// What a Pair's weights are made of. `random`: the first words of random bits.
struct NewPair {
  Pair exp_avg, denom;
  PairU random;
};
// The same of a block, Pair after Pair.
struct NewMoments {
  alignas(64) float exp_avg[kBlock];
  alignas(64) float denom[kBlock];
  alignas(64) float random[kBlock];
};
EPI_INLINE void put(float* p, Pair x) {
  store(p, x.a);
  store(p + kStepWidth, x.b);
}
template <bool kStochastic>
EPI_INLINE NewPair load_new(const NewMoments& next, int64_t k) {
  return {load_in_order(next.exp_avg + k), load_in_order(next.denom + k),
          kStochastic ? bits_of(load_in_order(next.random + k)) : PairU{}};
}

// A Pair's weights. `isolated`: their mask bits; S: the moments' type in memory.
template <bool kSplit, bool kStochastic, class S, class P>
EPI_INLINE void weights_of_pair(const StepContext& x, P* param, uint32_t isolated, const NewPair& next) {
  const Pair old = load_pair<kSplit>(param);
  const Pair theta = updated_weight(x.c, old, next.exp_avg, next.denom);
  const PairU random = low_half(next.random);
  if constexpr (sizeof(P) == 2 && sizeof(S) == 4) {  // as in moments_of_pair() of floats
    if (any(unordered(theta.a, theta.b))) [[unlikely]] {
      return store_pair_but<kSplit, kStochastic, true>(param, isolated, theta, old, random);
    }
  }
  store_pair_but<kSplit, kStochastic, false>(param, isolated, theta, old, random);
}

// Corrections of 8 bits as the upper halves of 16, and back. Bytes may alias anything: said not to, or no
// vectors.
EPI_INLINE void widen_corrections(uint16_t* __restrict to, const uint8_t* __restrict from, int64_t n) {
  for (int64_t k = 0; k < n; ++k) to[k] = static_cast<uint16_t>(from[k] << 8);
}
EPI_INLINE void narrow_corrections(uint8_t* __restrict to, const uint16_t* __restrict from, int64_t n) {
  for (int64_t k = 0; k < n; ++k) to[k] = static_cast<uint8_t>(from[k] >> 8);
}

// The weights of a block's elements `i` to `i + n` that are bfloat16, with the rest of their bits in `low`,
// where they start at 0.
template <bool kStochastic, bool kTo24Bits>
__attribute__((noinline)) void joined_weights_of_pairs(const StepContext& x, uint16_t* param, uint16_t* low,
                                                       int64_t i, int64_t n, const uint8_t* mask,
                                                       const NewMoments& next) {
  using F = StepF;
  const WeightRounding<F> rounding = weight_rounding<F>(kTo24Bits, kStochastic);
  const StepU to_high = Lanes<F>::u32(0x10000u);
#pragma GCC unroll 1
  for (int64_t k = 0; k < n; k += kPair) {
    const NewPair pair = load_new<kStochastic>(next, k);
    const Pair old = load_pair<true>(param + i + k), old_low = load_pair<true>(low + k);
    const auto joined = [](F high, F low_in_high) __attribute__((always_inline)) {
      return joined_weight<F>(bits_of(high), bits_of(low_in_high) >> 16);
    };
    const Pair theta{joined(old.a, old_low.a), joined(old.b, old_low.b)};
    const Pair moved = updated_weight(x.c, theta, pair.exp_avg, pair.denom);
    const PairU random = low_half(pair.random);
    const StepU even = weight_word(moved.a, random.a, rounding);
    const StepU odd = weight_word(moved.b, random.b, rounding);
    const uint32_t isolated = mask_word<PairBits>(mask, i + k);
    store_halves_but(param + i + k, isolated, nearest_half<F>(even), nearest_half<F>(odd), old);
    store_halves_but(low + k, isolated, even * to_high, odd * to_high, old_low);
  }
}

// The same, their corrections of 16 bits or of 8.
template <bool kStochastic>
__attribute__((noinline)) void corrected_weights_of_pairs(const StepContext& x, uint16_t* param,
                                                          const Corrections& corrections, int64_t i,
                                                          int64_t n, const uint8_t* mask,
                                                          const NewMoments& next) {
  if (corrections.of_16 != nullptr) {
    joined_weights_of_pairs<kStochastic, false>(x, param, corrections.of_16 + i, i, n, mask, next);
  } else {
    alignas(64) uint16_t low[kBlock];
    widen_corrections(low, corrections.of_8 + i, n);
    joined_weights_of_pairs<kStochastic, true>(x, param, low, i, n, mask, next);
    narrow_corrections(corrections.of_8 + i, low, n);
  }
}

// The weights of a block's elements `i` to `i + n`, whole pairs; of rows with some bfloat16 tensor.
template <bool kStochastic, class S, class P>
EPI_INLINE void weights_of_pairs(const StepContext& x, const StepPointers<P, S>& p, int64_t i, int64_t n,
                                 const uint8_t* mask, const NewMoments& next) {
  if constexpr (sizeof(P) == 2) {
    if (p.corrections.any()) [[unlikely]] {
      return corrected_weights_of_pairs<kStochastic>(x, p.param, p.corrections, i, n, mask, next);
    }
  }
#pragma GCC unroll 1
  for (int64_t k = 0; k < n; k += kPair) {
    weights_of_pair<true, kStochastic, S>(x, p.param + i + k, mask_word<PairBits>(mask, i + k),
                                          load_new<kStochastic>(next, k));
  }
}

}  // namespace epi::EPI_ISA
