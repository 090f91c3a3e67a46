// bfloat16 as the high half of a float32 word, rounded to nearest or stochastically
// (epi_kernels/reference/rounding.py).

#pragma once

#include "math/scalar.h"

namespace epi::EPI_ISA {

constexpr uint32_t kGolden = 0x9E3779B9u;
constexpr uint32_t kBfloat16Nan = 0x7FC0u;

// The public "lowbias32" mixer.
template <class U>
EPI_INLINE U mix(U x, U factor1, U factor2) {
  x = x ^ (x >> 16);
  x = x * factor1;
  x = x ^ (x >> 15);
  x = x * factor2;
  return x ^ (x >> 16);
}

template <class F>
EPI_INLINE typename Lanes<F>::U mix(typename Lanes<F>::U x) {
  return mix(x, Lanes<F>::u32(0x7FEB352Du), Lanes<F>::u32(0x846CA68Bu));
}

// Two words of random bits an element. Sixteen bits a tensor kind: theta w0 low, exp_avg w0 high,
// exp_avg_sq w1 low, importance w1 high. `element_key` = mix(rng_key ^ (index >> 32)), `index_low`
// the low word of the element's logical index.
template <class F>
EPI_INLINE typename Lanes<F>::U random_word0(typename Lanes<F>::U element_key,
                                             typename Lanes<F>::U index_low) {
  return mix<F>(index_low ^ element_key);
}

template <class F>
EPI_INLINE typename Lanes<F>::U random_word1(typename Lanes<F>::U word0) {
  return mix<F>(word0 + Lanes<F>::u32(kGolden));
}

// -> the bfloat16 in the low half of a word. One NaN stands for all: payloads do not survive.
template <class F>
EPI_INLINE typename Lanes<F>::U round_nearest_bf16(F x) {
  using L = Lanes<F>;
  const auto word = bits_of(x);
  const auto odd = (word >> 16) & L::u32(1u);
  const auto rounded = (word + L::u32(0x7FFFu) + odd) >> 16;
  return select(x != x, L::u32(kBfloat16Nan), rounded);
}

// `random_bits`: 16 bits an element. Non-finite values round to nearest.
template <class F>
EPI_INLINE typename Lanes<F>::U round_stochastic_bf16(F x, typename Lanes<F>::U random_bits) {
  const auto rounded = (bits_of(x) + random_bits) >> 16;
  const auto finite = is_finite(x);
  // overflow of the loss is rare: one branch spares the second rounding
  return any(!finite) ? select(finite, rounded, round_nearest_bf16(x)) : rounded;
}

}  // namespace epi::EPI_ISA
