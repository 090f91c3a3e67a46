// The score of an importance, its ordered key, and the exact inverse: bounds on u
// (epi_kernels/reference/stats.py, threshold.py).

#pragma once

#include "math/scalar.h"

namespace epi::EPI_ISA {

constexpr uint32_t kSign = 0x80000000u;
constexpr uint32_t kKeyLowestFinite = 0x00800000u;  // key of -FLT_MAX
constexpr uint32_t kKeyPositiveZero = 0x80000000u;  // key of +0
constexpr uint32_t kKeyInfinity = 0xFF800000u;      // key of +inf

constexpr uint32_t kBfloat16Infinity = 0x7F80u;

// What one layer's scores are made of; keep_factor = float32(1 - hysteresis).
struct ScoreTerms {
  float shift, scale, keep_factor;
};

// (u - shift) / scale, 0 where scale == 0; divided by keep_factor where the element is isolated
// now. -0 and +0 are one score, hence the sum at the end.
template <class F>
EPI_INLINE F score(F u, const ScoreTerms& terms, typename Lanes<F>::M isolated) {
  using L = Lanes<F>;
  F result = L::f32(0.0f);
  if (terms.scale != 0.0f) result = (u - L::f32(terms.shift)) / L::f32(terms.scale);
  if (terms.keep_factor != 1.0f) {
    result = select(isolated, result / L::f32(terms.keep_factor), result);
  }
  return result + L::f32(0.0f);
}

// Words ordered as the floats are (no NaN, no -0).
template <class F>
EPI_INLINE typename Lanes<F>::U ordered_key(F x) {
  using L = Lanes<F>;
  const auto word = bits_of(x);
  const auto sign = L::u32(kSign);
  return select((word & sign) == sign, word ^ L::u32(0xFFFFFFFFu), word ^ sign);
}

EPI_INLINE float float_of_key(uint32_t key) {
  return float_of(key >= kSign ? key ^ kSign : ~key);
}

// The smallest finite u, from the float with key `first` up, for which `holds`; +inf where none is.
// `holds` must be monotone in u, as every comparison of a score with a constant is: one float
// subtraction, one division by a positive number, each rounded, never reverse an order.
template <class Predicate>
EPI_INLINE float least_u(uint32_t first, const Predicate& holds) {
  uint32_t lo = first, hi = kKeyInfinity;
  while (lo < hi) {
    const uint32_t middle = lo + (hi - lo) / 2;
    if (holds(float_of_key(middle))) {
      hi = middle;
    } else {
      lo = middle + 1;
    }
  }
  return float_of_key(lo);
}

// The word of the smallest bfloat16 that is at least `bound`, a positive number.
EPI_INLINE int bf16_bound(float bound) {
  return static_cast<int>((bits_of(bound) + 0xFFFFu) >> 16);
}

struct KeyAtLeast {
  ScoreTerms terms;
  bool isolated;
  int64_t key;
  EPI_INLINE bool operator()(float u) const {
    return static_cast<int64_t>(ordered_key(score(u, terms, isolated))) >= key;
  }
};

// The bound on u of "the score's key is at least `key`".
EPI_INLINE float u_bound_of_key(const ScoreTerms& terms, bool isolated, int64_t key) {
  return least_u(kKeyLowestFinite, KeyAtLeast{terms, isolated, key});
}

struct Selected {
  ScoreTerms terms;
  bool isolated;
  float threshold;
  bool positive_only;
  EPI_INLINE bool operator()(float u) const {
    const float s = score(u, terms, isolated);
    return s >= threshold && (!positive_only || s > 0.0f);
  }
};

// The bound on u of "selected into the mask": score >= threshold, u > 0, and score > 0 where only
// positive scores count. Selects nothing where the threshold is +inf or the scale not positive.
EPI_INLINE float u_bound_of_selection(const ScoreTerms& terms, bool isolated, float threshold,
                                      bool positive_only) {
  const float infinity = float_of(0x7F800000u);
  if (!(threshold < infinity) || !(terms.scale > 0.0f)) return infinity;
  return least_u(kKeyPositiveZero + 1, Selected{terms, isolated, threshold, positive_only});
}

}  // namespace epi::EPI_ISA
