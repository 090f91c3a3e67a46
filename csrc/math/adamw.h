// One element's update: the equation of epi_kernels/reference/step.py, operation by operation.
//
// Every operator below is one IEEE rounding, in this order (-ffp-contract=off, nvcc -fmad=false).

#pragma once

#include "math/scalar.h"

namespace epi::EPI_ISA {

// Host scalars of one parameter's step, in the order of StepScalars (reference/scalars.py).
template <class F>
struct StepConstants {
  F beta1, one_minus_beta1;
  F beta2, one_minus_beta2;
  F beta_u, one_minus_beta_u;
  F eps;        // eps * sqrt(1 - beta2^t)
  F decay;      // 1 - lr * weight_decay
  F step_size;  // lr * sqrt(1 - beta2^t) / (1 - beta1^t)
};
constexpr int kStepScalars = 9, kEpsScalar = 6, kStepSizeScalar = 8;

template <class F>
EPI_INLINE StepConstants<F> step_constants(const float* s) {
  using L = Lanes<F>;
  return {L::f32(s[0]), L::f32(s[1]), L::f32(s[2]), L::f32(s[3]), L::f32(s[4]),
          L::f32(s[5]), L::f32(s[6]), L::f32(s[7]), L::f32(s[8])};
}

template <class F>
struct Updated {
  F theta;       // the weight, were the element not isolated
  F exp_avg;     // m
  F exp_avg_sq;  // v
};

// g: the gradient as the update sees it (unscaled, negated when maximizing); g_squared = g * g.
template <class F>
EPI_INLINE F exp_avg_ema(const StepConstants<F>& c, F exp_avg, F g) {
  return c.beta1 * exp_avg + c.one_minus_beta1 * g;
}
template <class F>
EPI_INLINE F exp_avg_sq_ema(const StepConstants<F>& c, F exp_avg_sq, F g_squared) {
  return c.beta2 * exp_avg_sq + c.one_minus_beta2 * g_squared;
}
template <class F>
EPI_INLINE F denominator(const StepConstants<F>& c, F v) {
  return sqrt_rn(v) + c.eps;
}
template <class F>
EPI_INLINE F updated_weight(const StepConstants<F>& c, F theta, F m, F denom) {
  return c.decay * theta - c.step_size * (m / denom);
}

template <class F>
EPI_INLINE Updated<F> adamw(const StepConstants<F>& c, F theta, F g, F g_squared, F exp_avg, F exp_avg_sq) {
  const F m = exp_avg_ema(c, exp_avg, g), v = exp_avg_sq_ema(c, exp_avg_sq, g_squared);
  return {updated_weight(c, theta, m, denominator(c, v)), m, v};
}

// The parameter's own importance, where it is not shared with exp_avg_sq.
template <class F>
EPI_INLINE F importance_ema(const StepConstants<F>& c, F importance, F g_squared) {
  return c.beta_u * importance + c.one_minus_beta_u * g_squared;
}

}  // namespace epi::EPI_ISA
