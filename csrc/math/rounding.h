// bfloat16 as the high half of a float32 word, rounded to nearest or stochastically
// (epi_kernels/reference/rounding.py).

#pragma once

#include "math/scalar.h"

namespace epi::EPI_ISA {

constexpr uint32_t kGolden = 0x9E3779B9u;
constexpr uint32_t kBfloat16Nan = 0x7FC0u;

// The public "lowbias32" mixer, but for its last step and its first.
template <class F>
EPI_INLINE typename Lanes<F>::U mix_folded(typename Lanes<F>::U x) {
  x = x * Lanes<F>::u32(0x7FEB352Du);
  x = x ^ (x >> 15);
  return x * Lanes<F>::u32(0x846CA68Bu);
}
template <class F>
EPI_INLINE typename Lanes<F>::U mix_but_last(typename Lanes<F>::U x) {
  return mix_folded<F>(x ^ (x >> 16));
}

template <class F>
EPI_INLINE typename Lanes<F>::U mix(typename Lanes<F>::U x) {
  x = mix_but_last<F>(x);
  return x ^ (x >> 16);
}

// A word of random bits, kept as it is before the mixer's last step, which leaves the high half alone.
template <class U>
struct RandomWord {
  U mixed;
  EPI_INLINE U word() const { return mixed ^ (mixed >> 16); }
  EPI_INLINE U high() const { return mixed >> 16; }
};

// Two words of random bits an element. Sixteen bits a tensor kind: theta w0 low, exp_avg w0 high,
// exp_avg_sq w1 low, importance w1 high. `element_key` = mix(rng_key ^ (index >> 32)), `index_low`
// the low word of the element's logical index.
template <class F>
EPI_INLINE RandomWord<typename Lanes<F>::U> random_word0(typename Lanes<F>::U element_key,
                                                         typename Lanes<F>::U index_low) {
  return {mix_but_last<F>(index_low ^ element_key)};
}

template <class F>
EPI_INLINE RandomWord<typename Lanes<F>::U> random_word1(typename Lanes<F>::U word0,
                                                         typename Lanes<F>::U golden) {
  return {mix_but_last<F>(word0 + golden)};
}

// A rounded bfloat16 is the high half of the word these return; what is below it is noise. The plain
// ones need an x that is no NaN, and cost four operations and one; an infinity rounds to itself.
template <class F>
EPI_INLINE typename Lanes<F>::U nearest_word(F x) {
  using L = Lanes<F>;
  const auto word = bits_of(x);
  return word + L::u32(0x7FFFu) + ((word >> 16) & L::u32(1u));
}

// `random_bits`: 16 bits an element.
template <class F>
EPI_INLINE typename Lanes<F>::U stochastic_word(F x, typename Lanes<F>::U random_bits) {
  return bits_of(x) + random_bits;
}

// One NaN stands for all: payloads do not survive.
template <class F>
EPI_INLINE typename Lanes<F>::U nearest_word_of_any(F x) {
  return select(x != x, Lanes<F>::u32(kBfloat16Nan << 16), nearest_word(x));
}

// Non-finite values round to nearest, which for an infinity is the same.
template <class F>
EPI_INLINE typename Lanes<F>::U stochastic_word_of_any(F x, typename Lanes<F>::U random_bits) {
  return select(is_finite(x), stochastic_word(x, random_bits), nearest_word_of_any(x));
}

// Either of the two, by a switch known at run time: up by 16 random bits, or, with `to_nearest` = 1 and
// the bits 0x8000, to nearest even. An infinity stays one whatever is added.
template <class F>
EPI_INLINE typename Lanes<F>::U switched_word(F x, typename Lanes<F>::U random_bits,
                                              typename Lanes<F>::U to_nearest) {
  const auto word = bits_of(x);
  const auto even = (word >> 16) ^ Lanes<F>::u32(0xFFFFFFFFu);
  return select(x != x, Lanes<F>::u32(kBfloat16Nan << 16), word + random_bits - (even & to_nearest));
}

}  // namespace epi::EPI_ISA
