// The streams of a step with 8-bit states, a block of 64 elements at a time, and the codes of a block.

#pragma once

#include "cpu/step_memory.h"
#include "math/codec.h"

namespace epi::EPI_ISA {

// Where a block's tensors lie. S: uint8_t where the moments are codes.
template <class P, class S>
struct CodedPointers {
  P* param;
  P* grad;
  S* exp_avg;
  S* exp_avg_sq;
  uint8_t* exp_avg_scale;
  uint8_t* exp_avg_sq_scale;
  // at most one of the three is there: the parameter's own importance
  float* importance_f32;
  uint16_t* importance_bf16;
  uint8_t* importance_u8;
  uint8_t* importance_scale;

  EPI_INLINE void advance(int64_t blocks = 1) {
    const int64_t n = blocks * kCodeBlock;
    param += n, grad += n, exp_avg += n, exp_avg_sq += n;
    exp_avg_scale += blocks, exp_avg_sq_scale += blocks;
    if (importance_f32 != nullptr) importance_f32 += n;
    if (importance_bf16 != nullptr) importance_bf16 += n;
    if (importance_u8 != nullptr) importance_u8 += n, importance_scale += blocks;
  }
  EPI_INLINE void prefetch() const {
    ahead(param), ahead(grad), ahead(exp_avg), ahead(exp_avg_sq);
    if (importance_f32 != nullptr) ahead(importance_f32);
    if (importance_bf16 != nullptr) ahead(importance_bf16);
    if (importance_u8 != nullptr) ahead(importance_u8);
  }
  template <class T>
  static EPI_INLINE void ahead(const T* p) {
    const char* line = reinterpret_cast<const char*>(p) + kPrefetchBytes;
    for (size_t i = 0; i < kCodeBlock * sizeof(T); i += 64) __builtin_prefetch(line + i);
  }
};

template <class P, class S>
EPI_INLINE CodedPointers<P, S> coded_pointers(TableRow row, int64_t start) {
  const int64_t flags = row[kFlags];
  const bool u8 = (flags & kImportanceInt8) != 0, bf16 = (flags & kImportanceBf16) != 0;
  CodedPointers<P, S> p{pointer<P>(row, kParam),
                        pointer<P>(row, kGrad),
                        pointer<S>(row, kExpAvg),
                        pointer<S>(row, kExpAvgSq),
                        pointer<uint8_t>(row, kExpAvgScale),
                        pointer<uint8_t>(row, kExpAvgSqScale),
                        u8 || bf16 ? nullptr : pointer<float>(row, kImportance),
                        bf16 ? pointer<uint16_t>(row, kImportance) : nullptr,
                        u8 ? pointer<uint8_t>(row, kImportance) : nullptr,
                        pointer<uint8_t>(row, kImportanceScale)};
  p.advance(start / kCodeBlock);
  return p;
}

// The last, incomplete block: copied here, followed by zeros, updated as a whole, copied back. Zeros
// stay zeros, and no block's largest value is one of them.
template <class P, class S>
struct CodedTail {
  P param[kCodeBlock] = {}, grad[kCodeBlock] = {};
  S exp_avg[kCodeBlock] = {}, exp_avg_sq[kCodeBlock] = {};
  float importance_f32[kCodeBlock] = {};
  uint16_t importance_bf16[kCodeBlock] = {};
  uint8_t importance_u8[kCodeBlock] = {};

  __attribute__((noinline)) CodedPointers<P, S> load(const CodedPointers<P, S>& p, int count) {
    copy(param, p.param, count);
    copy(grad, p.grad, count);
    copy(exp_avg, p.exp_avg, count);
    copy(exp_avg_sq, p.exp_avg_sq, count);
    CodedPointers<P, S> here = p;
    here.param = param, here.grad = grad, here.exp_avg = exp_avg, here.exp_avg_sq = exp_avg_sq;
    if (p.importance_f32 != nullptr) copy(here.importance_f32 = importance_f32, p.importance_f32, count);
    if (p.importance_bf16 != nullptr) copy(here.importance_bf16 = importance_bf16, p.importance_bf16, count);
    if (p.importance_u8 != nullptr) copy(here.importance_u8 = importance_u8, p.importance_u8, count);
    return here;
  }

  __attribute__((noinline)) void store(const CodedPointers<P, S>& p, int count, bool with_grad) const {
    copy(p.param, param, count);
    if (with_grad) copy(p.grad, grad, count);
    copy(p.exp_avg, exp_avg, count);
    copy(p.exp_avg_sq, exp_avg_sq, count);
    if (p.importance_f32 != nullptr) copy(p.importance_f32, importance_f32, count);
    if (p.importance_bf16 != nullptr) copy(p.importance_bf16, importance_bf16, count);
    if (p.importance_u8 != nullptr) copy(p.importance_u8, importance_u8, count);
  }
};

// What the halves of a block's codes are multiplied by.
struct CodedFactors {
  StepF exp_avg, exp_avg_sq, importance;
};
template <bool kSigned>
EPI_INLINE StepF factor_of(const uint8_t* scale) {
  return Lanes<StepF>::f32(Block<kSigned>::of_scale(*scale).factor());
}
template <bool kOwn, class P, class S>
EPI_INLINE CodedFactors coded_factors(const CodedPointers<P, S>& p) {
  CodedFactors f{};
  if constexpr (sizeof(S) == 1) {
    f.exp_avg = factor_of<true>(p.exp_avg_scale);
    f.exp_avg_sq = factor_of<false>(p.exp_avg_sq_scale);
  }
  if constexpr (kOwn) {
    if (p.importance_u8 != nullptr) f.importance = factor_of<false>(p.importance_scale);
  }
  return f;
}

// A pair of a state, codes or not.
template <bool kSigned, class T>
EPI_INLINE Pair load_state(const T* p, StepF factor) {
  if constexpr (sizeof(T) == 1) {
    const Pair half = load_codes<kSigned>(p);
    return {half.a * factor, half.b * factor};
  } else {
    return load_pair<true>(p);
  }
}

// A block's values, until the largest is known.
template <bool kSigned>
struct NewValues {
  alignas(64) float values[kCodeBlock];
  StepU top;  // lane by lane, without the sign

  EPI_INLINE void put(int j, Pair x) {
    store(values + j, x.a);
    store(values + j + kStepWidth, x.b);
    const StepU magnitude = Lanes<StepF>::u32(kMagnitude);
    top = max_signed(top, max_signed(bits_of(x.a) & magnitude, bits_of(x.b) & magnitude));
  }
  EPI_INLINE Pair at(int j) const { return load_in_order(values + j); }
};
// Its random words.
struct BlockWords {
  alignas(64) float words[kCodeBlock];

  EPI_INLINE void put(int j, const RandomPair& w) {
    store(words + j, float_of(w.a.mixed));
    store(words + j + kStepWidth, float_of(w.b.mixed));
  }
  EPI_INLINE RandomPair at(int j) const {
    const Pair x = load_in_order(words + j);
    return {{bits_of(x.a)}, {bits_of(x.b)}};
  }
};
struct CodedBlock {
  NewValues<true> exp_avg;
  NewValues<false> exp_avg_sq, importance;
  BlockWords w0, w1;

  EPI_INLINE void clear() { exp_avg.top = exp_avg_sq.top = importance.top = Lanes<StepF>::u32(0); }
};

// Writes a block's codes and its scale. `random`: the RandomBits of the pair at a position.
template <bool kStochastic, bool kSigned, class Random>
EPI_INLINE void encode(uint8_t* codes, uint8_t* scale, const NewValues<kSigned>& x, const Random& random) {
  const auto block = Block<kSigned>::of_values(largest(x.top));
  *scale = static_cast<uint8_t>(block.scale());
  if (!block.finite) [[unlikely]] {
    memset(codes, kNonfiniteCode<kSigned>, kCodeBlock);
    return;
  }
  const Grid<StepF> lines = grid<StepF>(block);
#pragma GCC unroll 1
  for (int j = 0; j < kCodeBlock; j += kPair) {
    const Pair y = x.at(j);
    RandomBits r{Lanes<StepF>::u32(kNearest), Lanes<StepF>::u32(kNearest)};
    if constexpr (kStochastic) r = random(j);
    if constexpr (kSigned) {
      store_codes_signed(codes + j, code_word_signed(y.a, lines) + r.a, code_word_signed(y.b, lines) + r.b,
                         y);
    } else {
      store_codes(codes + j, code_word_unsigned(y.a, lines) + r.a, code_word_unsigned(y.b, lines) + r.b);
    }
  }
}

}  // namespace epi::EPI_ISA
