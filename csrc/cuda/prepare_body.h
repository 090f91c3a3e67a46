// What a step needs to know of t, computed where `step` lies: the host never waits for it. One thread a
// row, before the step kernel; the arithmetic is that of epi_kernels/reference/scalars.py, float64
// operation by float64 operation.

#pragma once

#include "cuda/block.h"
#include "cuda/table.h"
#include "math/adamw.h"
#include "math/rounding.h"

namespace epi::cuda {

EPI_KERNEL double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent != 0; exponent >>= 1) {
    if ((exponent & 1) != 0) result = result * base;
    base = base * base;
  }
  return result;
}

EPI_KERNEL void prepare_row(const PrepareArgs& args, int64_t r) {
  namespace math = epi::scalar;
  int64_t* row = args.rows + r * kColumns;
  float* step = reinterpret_cast<float*>(row[kStep]);
  const int64_t t = static_cast<int64_t>(*step) + 1;

  const double* hyper = args.hyper + r * kHyperColumns;
  const double lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2], eps = hyper[3];
  const double root = sqrt(1.0 - power(beta2, t));
  float* scalars = args.scalars + r * math::kStepScalars;
  scalars[math::kEpsScalar] = static_cast<float>(eps * root);
  scalars[math::kStepSizeScalar] = static_cast<float>(lr * root / (1.0 - power(beta1, t)));

  const uint32_t rng_id = static_cast<uint32_t>(row[kRngKey]);
  row[kRngKey] = math::mix<float>(math::mix<float>(args.mixed_seed ^ static_cast<uint32_t>(t)) ^ rng_id);

  const bool skipped = args.found_inf != nullptr && *args.found_inf != 0.0f;
  if (skipped) {
    row[kFlags] |= kSkipped;
  } else {
    *step = *step + 1.0f;
  }
  if (r == 0 && args.grad_scale != nullptr) {
    *args.grad_multiplier = static_cast<float>(1.0 / static_cast<double>(*args.grad_scale));
  }
}

template <class Block>
EPI_KERNEL void prepare_program(const PrepareArgs& args, const Block& block) {
  const int64_t r = block.index() * block.threads() + block.thread();
  if (r < args.n_rows) prepare_row(args, r);
}

}  // namespace epi::cuda
