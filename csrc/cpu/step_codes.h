// Stage 1 where a state is 8-bit: the masked update block by block of 64 elements. New moments are
// computed first, for their largest magnitude scales the block; then they become codes.

#pragma once

#include "cpu/codes.h"
#include "cpu/step.h"

namespace epi::EPI_ISA {

constexpr int kPairsOfBlock = kCodeBlock / kPair;

enum class Kind { kNone, kFloat32, kBfloat16, kCodes };

EPI_INLINE Kind kind_of(TableRow row, int64_t bf16, int64_t int8) {
  return (row[kFlags] & int8) != 0   ? Kind::kCodes
         : (row[kFlags] & bf16) != 0 ? Kind::kBfloat16
                                     : Kind::kFloat32;
}

// One moment of a row, at the block that is being stepped.
struct Moment {
  Kind kind;
  char* data;
  uint8_t* scale;  // of the block, where kind is kCodes

  EPI_INLINE int item_bytes() const {
    constexpr int kBytes[] = {0, 4, 2, 1};
    return kBytes[static_cast<int>(kind)];
  }
  EPI_INLINE Moment at(int64_t element) const {
    return {kind, data + element * item_bytes(), scale + element / kCodeBlock};
  }
};

// What becomes of a moment within a block.
struct NewMoment {
  Pair values[kPairsOfBlock];
  StepU top;  // largest magnitude, lane by lane
};

template <bool kSigned>
EPI_INLINE Pair load_moment(const Moment& m, StepF factor, int i) {
  switch (m.kind) {
    case Kind::kFloat32:
      return load_split(reinterpret_cast<const float*>(m.data) + i);
    case Kind::kBfloat16:
      return load_split(reinterpret_cast<const uint16_t*>(m.data) + i);
    default: {
      const Pair half = load_split_codes<kSigned>(reinterpret_cast<const uint8_t*>(m.data) + i);
      return {half.a * factor, half.b * factor};
    }
  }
}

// Stores floats at once; what becomes codes waits for the block's scale.
template <bool kSigned, bool kStochastic>
EPI_INLINE void take_moment(const Moment& m, NewMoment& fresh, int i, Pair x, RandomBits r) {
  switch (m.kind) {
    case Kind::kFloat32:
      return store_pair<true, kStochastic, true>(reinterpret_cast<float*>(m.data) + i, x, r);
    case Kind::kBfloat16:
      return store_pair<true, kStochastic, true>(reinterpret_cast<uint16_t*>(m.data) + i, x, r);
    default: {
      fresh.values[i / kPair] = x;
      StepU a = bits_of(x.a), b = bits_of(x.b);
      if constexpr (kSigned) {  // the others are positive, or no number, which is the largest either way
        const StepU magnitude = Lanes<StepF>::u32(kMagnitude);
        a = a & magnitude, b = b & magnitude;
      }
      fresh.top = max(fresh.top, max(a, b));
    }
  }
}

EPI_INLINE uint32_t largest(StepU x) {
  uint32_t lanes[kStepWidth];
  store(lanes, x);
  uint32_t top = lanes[0];
  for (int i = 1; i < kStepWidth; ++i) top = lanes[i] > top ? lanes[i] : top;
  return top;
}

// `random(j)`: the bits of the j-th pair.
template <bool kSigned, class Random>
EPI_INLINE void store_codes(const Moment& m, const NewMoment& fresh, const Random& random) {
  using L = Lanes<StepF>;
  uint8_t* codes = reinterpret_cast<uint8_t*>(m.data);
  const uint32_t exponent = block_exponent(largest(fresh.top));
  if (exponent >= (kSigned ? kSignedLimit : kPositiveLimit)) [[unlikely]] {
    *m.scale = static_cast<uint8_t>(kNonfiniteScale);
    memset(codes, kSigned ? 0 : 255, kCodeBlock);
    return;
  }
  *m.scale = static_cast<uint8_t>(exponent - kLowestExponent);
  const StepF factor = L::f32(signed_shift(exponent));
  const StepU base = L::u32(positive_base(exponent));
#pragma GCC unroll 1
  for (int j = 0; j < kPairsOfBlock; ++j) {
    const Pair x = fresh.values[j];
    const RandomBits r = random(j);
    if constexpr (kSigned) {
      store_split_codes(codes + j * kPair, encode_signed(x.a, r.a, factor), encode_signed(x.b, r.b, factor));
    } else {
      store_split_codes(codes + j * kPair, encode_positive(x.a, r.a, base), encode_positive(x.b, r.b, base));
    }
  }
}

template <class P>
struct Block {
  P* param;
  P* grad;
  Moment exp_avg, exp_avg_sq, importance;

  EPI_INLINE Block at(int64_t element) const {
    return {param + element, grad + element, exp_avg.at(element), exp_avg_sq.at(element),
            importance.at(element)};
  }
  EPI_INLINE void prefetch() const {
    using Ahead = StepPointers<P, float>;
    Ahead::template ahead<kCodeBlock>(param), Ahead::template ahead<kCodeBlock>(grad);
    __builtin_prefetch(exp_avg.data + kPrefetchBytes), __builtin_prefetch(exp_avg_sq.data + kPrefetchBytes);
  }
};

template <bool kSigned>
EPI_INLINE StepF factor_of(const Moment& m) {
  if (m.kind != Kind::kCodes) return Lanes<StepF>::f32(1.0f);
  return Lanes<StepF>::f32(kSigned ? signed_factor(*m.scale) : positive_factor(*m.scale));
}

// Sixty-four elements; `isolated`: their mask bits.
template <bool kOwn, bool kStochastic, class P>
EPI_INLINE void step_block(const StepContext& x, const Block<P>& block, uint64_t isolated, StepU& index) {
  using L = Lanes<StepF>;
  const StepF m_factor = factor_of<true>(block.exp_avg), v_factor = factor_of<false>(block.exp_avg_sq);
  const StepF u_factor = kOwn ? factor_of<false>(block.importance) : v_factor;
  NewMoment m, v, u;
  m.top = v.top = u.top = L::u32(0);
  RandomPair words[2][kPairsOfBlock];  // the first and the second of every element
#pragma GCC unroll 1
  for (int j = 0; j < kPairsOfBlock; ++j) {
    const int i = j * kPair;
    Pair g = load_split(block.grad + i);
    if (x.has_multiplier) {
      g = {g.a * x.multiplier, g.b * x.multiplier};
      store_pair<true, false, true>(block.grad + i, g, RandomBits{});
    }
    const Pair theta = load_split(block.param + i);
    const Pair old_m = load_moment<true>(block.exp_avg, m_factor, i);
    const Pair old_v = load_moment<false>(block.exp_avg_sq, v_factor, i);
    const Pair g2{g.a * g.a, g.b * g.b};
    const auto a = adamw(x.c, theta.a, g.a, g2.a, old_m.a, old_v.a);
    const auto b = adamw(x.c, theta.b, g.b, g2.b, old_m.b, old_v.b);

    RandomPair w0{}, w1{};
    if constexpr (kStochastic) {
      w0 = {random_word0_of(x, index), random_word0_of(x, index + x.to_second)};
      w1 = {random_word1<StepF>(w0.a.word(), x.golden), random_word1<StepF>(w0.b.word(), x.golden)};
      index = index + x.pace;
    }
    words[0][j] = w0, words[1][j] = w1;
    take_moment<true, kStochastic>(block.exp_avg, m, i, {a.exp_avg, b.exp_avg}, high_halves(w0));
    take_moment<false, kStochastic>(block.exp_avg_sq, v, i, {a.exp_avg_sq, b.exp_avg_sq}, low_halves(w1));
    if constexpr (kOwn) {
      const Pair old_u = load_moment<false>(block.importance, u_factor, i);
      const Pair fresh{importance_ema(x.c, old_u.a, g2.a), importance_ema(x.c, old_u.b, g2.b)};
      take_moment<false, kStochastic>(block.importance, u, i, fresh, high_halves(w1));
    }
    const uint32_t keep = static_cast<PairBits>(isolated >> i);
    const Pair moved{a.theta, b.theta};
    if (sizeof(P) == 2 && any(unordered(moved.a, moved.b))) [[unlikely]] {
      store_pair_but<true, kStochastic, true>(block.param + i, keep, moved, theta, low_halves(w0));
    } else {
      store_pair_but<true, kStochastic, false>(block.param + i, keep, moved, theta, low_halves(w0));
    }
  }
  using Bits = RandomBits;
  const Bits nearest{L::u32(kNearest), L::u32(kNearest)};
  const auto first_high = [&](int j) { return kStochastic ? high_halves(words[0][j]) : nearest; };
  const auto second_low = [&](int j) { return kStochastic ? low_halves(words[1][j]) : nearest; };
  const auto second_high = [&](int j) { return kStochastic ? high_halves(words[1][j]) : nearest; };
  if (block.exp_avg.kind == Kind::kCodes) store_codes<true>(block.exp_avg, m, first_high);
  if (block.exp_avg_sq.kind == Kind::kCodes) store_codes<false>(block.exp_avg_sq, v, second_low);
  if (kOwn && block.importance.kind == Kind::kCodes) store_codes<false>(block.importance, u, second_high);
}

// The last, incomplete block: copied here, stepped as a whole with zeros behind, copied back.
template <class P>
struct BlockTail {
  P param[kCodeBlock] = {}, grad[kCodeBlock] = {};
  alignas(64) char moments[3][4 * kCodeBlock] = {};

  Block<P> load(const Block<P>& from, int count) {
    copy(param, from.param, count);
    copy(grad, from.grad, count);
    Block<P> here{param, grad, from.exp_avg, from.exp_avg_sq, from.importance};
    Moment* moments_here[3] = {&here.exp_avg, &here.exp_avg_sq, &here.importance};
    for (int k = 0; k < 3; ++k) {
      Moment& moment = *moments_here[k];
      memcpy(moments[k], moment.data, static_cast<size_t>(count) * moment.item_bytes());
      moment.data = moments[k];
    }
    return here;
  }
  void store(const Block<P>& to, int count, bool with_grad) const {
    copy(to.param, param, count);
    if (with_grad) copy(to.grad, grad, count);
    const Moment* moments_there[3] = {&to.exp_avg, &to.exp_avg_sq, &to.importance};
    for (int k = 0; k < 3; ++k) {
      const Moment& moment = *moments_there[k];
      memcpy(moment.data, moments[k], static_cast<size_t>(count) * moment.item_bytes());
    }
  }
};

template <bool kParam16, bool kOwn, bool kStochastic>
void step_codes_range(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  using P = stored_t<kParam16>;
  const StepContext x = step_context<true>(row, start, stop, a);
  const uint8_t* mask = pointer<const uint8_t>(row, kIsolationMask);
  const Kind state = kind_of(row, kStateBf16, kStateInt8);
  const Block<P> whole{pointer<P>(row, kParam),
                       pointer<P>(row, kGrad),
                       {state, pointer<char>(row, kExpAvg), pointer<uint8_t>(row, kExpAvgScale)},
                       {state, pointer<char>(row, kExpAvgSq), pointer<uint8_t>(row, kExpAvgSqScale)},
                       {kOwn ? kind_of(row, kImportanceBf16, kImportanceInt8) : Kind::kNone,
                        pointer<char>(row, kImportance), pointer<uint8_t>(row, kImportanceScale)}};
  StatsSums<F16> sums = empty_sums<F16>();
  StepU index = first_indices<true>(x);
  for (int64_t block = start; block < stop; block += kBlock) {
    const int64_t end = block + kBlock < stop ? block + kBlock : stop;
    int64_t i = block;
    for (; i + kCodeBlock <= end; i += kCodeBlock) {
      const Block<P> here = whole.at(i);
      here.prefetch();
      step_block<kOwn, kStochastic>(x, here, mask_word<uint64_t>(mask, i), index);
    }
    if (i < end) {
      const int count = static_cast<int>(end - i);
      const Block<P> here = whole.at(i);
      BlockTail<P> tail;
      step_block<kOwn, kStochastic>(x, tail.load(here, count), mask_bits<uint64_t>(mask, i, count), index);
      tail.store(here, count, a.has_grad_multiplier);
    }
    if (a.stats != nullptr) add_stored(sums, row, block, end - block, a.moments);
  }
  if (a.stats != nullptr) *a.stats = reduce(sums);
}

template <bool kParam16, bool kOwn>
void step_codes_rounding(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  a.stochastic_rounding ? step_codes_range<kParam16, kOwn, true>(row, start, stop, a)
                        : step_codes_range<kParam16, kOwn, false>(row, start, stop, a);
}

// Any row of which some state is codes.
inline void step_codes(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  const bool own = row[kImportance] != 0;
  if ((row[kFlags] & kParamBf16) != 0) {
    own ? step_codes_rounding<true, true>(row, start, stop, a)
        : step_codes_rounding<true, false>(row, start, stop, a);
  } else {
    own ? step_codes_rounding<false, true>(row, start, stop, a)
        : step_codes_rounding<false, false>(row, start, stop, a);
  }
}

// Stage 1 of any row.
inline void step(TableRow row, int64_t start, int64_t stop, const StepArguments& a) {
  if ((row[kFlags] & (kStateInt8 | kImportanceInt8)) != 0) return step_codes(row, start, stop, a);
  step_floats(row, start, stop, a);
}

}  // namespace epi::EPI_ISA
