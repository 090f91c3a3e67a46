// The streams of the step: where a range's tensors lie, how they are read and written.

#pragma once

#include "cpu/rows.h"
#include "math/rounding.h"

namespace epi::EPI_ISA {

// The step takes a Pair of vectors at once: thirty-two elements or sixteen, as many as the instruction
// set's registers hold with all that is computed from them (vec_*.h).
using StepU = Lanes<StepF>::U;
using PairU = Lanes<Pair>::U;
constexpr int kPair = 2 * kStepWidth;
using PairBits = PairBitsOf<kPair>::type;  // a pair's mask bits

// What bfloat16 weights are short of (math/master.h); at most one of the two is there.
struct Corrections {
  uint16_t* of_16;
  uint8_t* of_8;
  EPI_INLINE bool any() const { return of_16 != nullptr || of_8 != nullptr; }
};

template <class P, class S>
struct StepPointers {
  P* param;
  P* grad;
  S* exp_avg;
  S* exp_avg_sq;
  // at most one of the two is there: the parameter's own importance. A branch of the loop that always
  // goes one way, and half the instances to compile
  float* importance_f32;
  uint16_t* importance_bf16;
  Corrections corrections;

  template <bool kOwn, int kElements>
  EPI_INLINE void prefetch(int64_t i) const {
    ahead<kElements>(param + i), ahead<kElements>(grad + i);
    ahead<kElements>(exp_avg + i), ahead<kElements>(exp_avg_sq + i);
    if constexpr (kOwn) {
      if (importance_f32 != nullptr) ahead<kElements>(importance_f32 + i);
      if (importance_bf16 != nullptr) ahead<kElements>(importance_bf16 + i);
    }
  }
};

template <class P, class S>
EPI_INLINE StepPointers<P, S> step_pointers(TableRow row) {
  const bool bf16 = (row[kFlags] & kImportanceBf16) != 0, int8 = (row[kFlags] & kImportanceInt8) != 0;
  const bool eight_bits = (row[kFlags] & kCorrectionInt8) != 0;
  return {pointer<P>(row, kParam),
          pointer<P>(row, kGrad),
          pointer<S>(row, kExpAvg),
          pointer<S>(row, kExpAvgSq),
          bf16 || int8 ? nullptr : pointer<float>(row, kImportance),
          bf16 ? pointer<uint16_t>(row, kImportance) : nullptr,
          {eight_bits ? nullptr : pointer<uint16_t>(row, kWeightCorrection),
           eight_bits ? pointer<uint8_t>(row, kWeightCorrection) : nullptr}};
}

// The last, incomplete unit of a range: copied here, followed by zeros, updated as a whole, copied back.
// kMoments: exp_avg and exp_avg_sq too, which else are somebody else's business.
template <class P, class S, int kElements, bool kMoments = true>
struct StepTail {
  P param[kElements] = {}, grad[kElements] = {};
  S exp_avg[kElements] = {}, exp_avg_sq[kElements] = {};
  float importance_f32[kElements] = {};
  uint16_t importance_bf16[kElements] = {};
  uint16_t correction_16[kElements] = {};
  uint8_t correction_8[kElements] = {};

  __attribute__((noinline)) StepPointers<P, S> load(const StepPointers<P, S>& p, int64_t i, int count) {
    copy(param, p.param + i, count);
    copy(grad, p.grad + i, count);
    if constexpr (kMoments) {
      copy(exp_avg, p.exp_avg + i, count);
      copy(exp_avg_sq, p.exp_avg_sq + i, count);
    }
    StepPointers<P, S> here{param, grad, exp_avg, exp_avg_sq, nullptr, nullptr, {nullptr, nullptr}};
    if (p.importance_f32 != nullptr) {
      copy(here.importance_f32 = importance_f32, p.importance_f32 + i, count);
    }
    if (p.importance_bf16 != nullptr) {
      copy(here.importance_bf16 = importance_bf16, p.importance_bf16 + i, count);
    }
    const Corrections& c = p.corrections;
    if (c.of_16 != nullptr) copy(here.corrections.of_16 = correction_16, c.of_16 + i, count);
    if (c.of_8 != nullptr) copy(here.corrections.of_8 = correction_8, c.of_8 + i, count);
    return here;
  }

  __attribute__((noinline)) void store(const StepPointers<P, S>& p, int64_t i, int count,
                                       bool with_grad) const {
    copy(p.param + i, param, count);
    if (with_grad) copy(p.grad + i, grad, count);
    if constexpr (kMoments) {
      copy(p.exp_avg + i, exp_avg, count);
      copy(p.exp_avg_sq + i, exp_avg_sq, count);
    }
    if (p.importance_f32 != nullptr) copy(p.importance_f32 + i, importance_f32, count);
    if (p.importance_bf16 != nullptr) copy(p.importance_bf16 + i, importance_bf16, count);
    if (p.corrections.of_16 != nullptr) copy(p.corrections.of_16 + i, correction_16, count);
    if (p.corrections.of_8 != nullptr) copy(p.corrections.of_8 + i, correction_8, count);
  }
};

// kSplit: even and odd elements apart, where any tensor of the row is bfloat16; else in order.
template <bool kSplit, class T>
EPI_INLINE Pair load_pair(const T* p) {
  if constexpr (kSplit) {
    return load_split(p);
  } else {
    static_assert(sizeof(T) == sizeof(float));
    return load_in_order(p);
  }
}

template <bool kSplit>
EPI_INLINE Pair as_in_memory(Pair x) {
  return kSplit ? in_order(x) : x;
}

// kSpecial: some value may be no number.
template <bool kStochastic, bool kSpecial>
EPI_INLINE StepU rounded_word(StepF x, StepU random_bits) {
  if constexpr (kStochastic) {
    return kSpecial ? stochastic_word_of_any(x, random_bits) : stochastic_word(x, random_bits);
  } else {
    return kSpecial ? nearest_word_of_any(x) : nearest_word(x);
  }
}

template <bool kSplit, bool kStochastic, bool kSpecial>
EPI_INLINE void store_pair(float* p, Pair x, PairU) {
  const Pair y = as_in_memory<kSplit>(x);
  store(p, y.a);
  store(p + kStepWidth, y.b);
}
template <bool kSplit, bool kStochastic, bool kSpecial>
EPI_INLINE void store_pair(uint16_t* p, Pair x, PairU r) {
  static_assert(kSplit);
  store_halves(p, rounded_word<kStochastic, kSpecial>(x.a, r.a),
               rounded_word<kStochastic, kSpecial>(x.b, r.b));
}

// Elements whose bit in `keep` is set retain their bits.
template <bool kSplit, bool kStochastic, bool kSpecial>
EPI_INLINE void store_pair_but(float* p, uint32_t keep, Pair x, Pair old, PairU) {
  store_but(p, keep, as_in_memory<kSplit>(x), as_in_memory<kSplit>(old));
}
template <bool kSplit, bool kStochastic, bool kSpecial>
EPI_INLINE void store_pair_but(uint16_t* p, uint32_t keep, Pair x, Pair old, PairU r) {
  store_halves_but(p, keep, rounded_word<kStochastic, kSpecial>(x.a, r.a),
                   rounded_word<kStochastic, kSpecial>(x.b, r.b), old);
}

}  // namespace epi::EPI_ISA
