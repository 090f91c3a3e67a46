// Weights of 24 or 32 bits, kept as bfloat16 and a correction beside it (epi_kernels/reference/master.py).

#pragma once

#include "math/rounding.h"

namespace epi::EPI_ISA {

// `high`: the bfloat16 in a word's high half. `low`: the correction's 16 bits in a word's low half, nothing
// above them; one of 8 bits is the upper byte of those.
template <class F>
EPI_INLINE F joined_weight(typename Lanes<F>::U high, typename Lanes<F>::U low) {
  const auto sign = Lanes<F>::u32(0x8000u);
  const F x = float_of(high + (low ^ sign) - sign);
  return select(x != x, float_of(high), x);  // a correction that makes a NaN is another weight's
}

// How a float32 word loses its lowest byte, if it does: what of random bits and of what rounds to nearest is
// added, and what is kept then.
template <class F>
struct WeightRounding {
  typename Lanes<F>::U random, nearest, kept;
};
template <class F>
EPI_INLINE WeightRounding<F> weight_rounding(bool to_24_bits, bool stochastic) {
  using L = Lanes<F>;
  return {L::u32(to_24_bits && stochastic ? 0xFFu : 0u), L::u32(to_24_bits && !stochastic ? 0xFFu : 0u),
          L::u32(to_24_bits ? 0xFFFFFF00u : 0xFFFFFFFFu)};
}

// The weight's word; its correction is the low half as it is. `random_bits`: 16 an element.
template <class F>
EPI_INLINE typename Lanes<F>::U weight_word(F x, typename Lanes<F>::U random_bits,
                                            const WeightRounding<F>& rounding) {
  using L = Lanes<F>;
  const auto word = bits_of(x);
  const auto nearest = L::u32(0x7Fu) + ((word >> 8) & L::u32(1u));
  const auto added = ((random_bits >> 8) & rounding.random) + (nearest & rounding.nearest);
  return select(x != x, L::u32(kBfloat16Nan << 16), (word + added) & rounding.kept);
}

// The bfloat16 nearest to the weight, a tie away from 0, in a word's high half; what is below it is noise.
template <class F>
EPI_INLINE typename Lanes<F>::U nearest_half(typename Lanes<F>::U weight_word) {
  return weight_word + Lanes<F>::u32(0x8000u);
}

}  // namespace epi::EPI_ISA
