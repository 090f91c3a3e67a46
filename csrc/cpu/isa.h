// The four stages for one instruction set: included once by each isa_*.cpp, after its vec_*.h.

#pragma once

#include "cpu/kernels.h"
#include "cpu/mask.h"
#include "cpu/stats.h"
#include "cpu/step_codes.h"
#include "cpu/step_nibbles.h"
#include "cpu/threshold.h"
#include "math/score.h"

namespace epi::EPI_ISA {

inline void step(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  if ((row[kFlags] & kStateInt4) != 0) return step_nibbles(row, start, stop, a);
  (row[kFlags] & (kStateInt8 | kImportanceInt8)) != 0 ? step_codes(row, start, stop, a)
                                                      : step_floats(row, start, stop, a);
}

inline float key_bound(float shift, float scale, float keep_factor, bool isolated, int64_t key) {
  return u_bound_of_key({shift, scale, keep_factor}, isolated, key);
}

inline float selection_bound(float shift, float scale, float keep_factor, bool isolated, float threshold,
                             bool positive_only) {
  return u_bound_of_selection({shift, scale, keep_factor}, isolated, threshold, positive_only);
}

constexpr Kernels stages(const char* name) {
  return {name, step, stats<F16>, count<F16>, select_mask<F16>, key_bound, selection_bound};
}

}  // namespace epi::EPI_ISA
