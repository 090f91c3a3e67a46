// 4-bit states (math/nibbles.h), N consecutive elements in registers. What the CPU looks up is computed.

#pragma once

#include "cuda/memory.h"
#include "math/nibbles.h"

namespace epi::cuda {

// Stands for the type of packed codes; the pointers are to bytes.
struct Nibbles {};

// EPI_LEVELS: the least of three straight lines in float32's words.
EPI_KERNEL float level(uint32_t code) {
  const int c = static_cast<int>(code);
  const int binades = 2 * c - 18 < c - 13 ? 2 * c - 18 : c - 13, half_binades = c - 14;
  const int halves = 2 * binades < half_binades ? 2 * binades : half_binades;
  return code == 0 ? 0.0f : math::float_of(static_cast<uint32_t>((254 + halves) << 22));
}
struct Root {
  int shift;  // 2^-shift times one of four mantissas
  bool of2, of3, of6;
};
EPI_KERNEL Root root_of(uint32_t code) {
  const int c = code < 1 ? 1 : static_cast<int>(code);
  const int half = (15 - c) / 2 - 1, whole = 9 - c;
  const int shift = half > whole ? half : whole;
  return {shift > 0 ? shift : 0, c >= 6 && c <= 12 && c % 2 == 0, c == 13, c == 15};
}
EPI_KERNEL float power_of_two(int exponent) {
  return math::float_of(static_cast<uint32_t>(127 + exponent) << 23);
}
// EPI_ROOTS, and 1 over them.
EPI_KERNEL float root(uint32_t code) {
  const Root r = root_of(code);
  const float mantissa = r.of2 ? math::kRoots2 : r.of3 ? math::kRoots3 : r.of6 ? math::kRoots6 : 1.0f;
  return mantissa * power_of_two(-r.shift);
}
EPI_KERNEL float inverse_root(uint32_t code) {
  constexpr float k2 = 1.0f / math::kRoots2, k3 = 1.0f / math::kRoots3, k6 = 1.0f / math::kRoots6;
  const Root r = root_of(code);
  return (r.of2 ? k2 : r.of3 ? k3 : r.of6 ? k6 : 1.0f) * power_of_two(r.shift);
}
EPI_KERNEL float magnitude(uint32_t code) {
  const float normal = math::float_of((code + 254u) << 22), subnormal = math::float_of((code + 256u) << 22);
  return subnormal - 2.0f < normal ? subnormal - 2.0f : normal;
}

EPI_KERNEL float scale_at(const uint8_t* scales, int64_t start, int64_t count = 1) {
  if (count <= 0) return 0.0f;
  const auto* halves = reinterpret_cast<const uint16_t*>(scales);
  return math::float_of(static_cast<uint32_t>(halves[start / math::kCodeBlock]) << 16);
}

// The codes of elements start .. start + N - 1, of which `count` exist; `start` is even.
template <int N, bool kWide>
EPI_KERNEL Pack<uint8_t, N> load_nibbles(const Nibbles* packed, int64_t start, int count = N) {
  const uint8_t* p = reinterpret_cast<const uint8_t*>(packed) + start / 2;
  Pack<uint8_t, N / 2> bytes;
  if constexpr (kWide && N == 16) {
    bytes = load<uint8_t, N / 2, true>(p);
  } else {
    bytes = load<uint8_t, N / 2, false>(p, (count + 1) / 2);
  }
  Pack<uint8_t, N> codes;
#pragma unroll
  for (int j = 0; j < N / 2; ++j) {
    codes.v[2 * j] = bytes.v[j] & 15;
    codes.v[2 * j + 1] = bytes.v[j] >> 4;
  }
  return codes;
}
template <bool kWide>
EPI_KERNEL void store_nibbles(Nibbles* packed, int64_t start, const Pack<uint8_t, 16>& codes, int count) {
  uint8_t* p = reinterpret_cast<uint8_t*>(packed) + start / 2;
  Pack<uint8_t, 8> bytes;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint32_t high = kWide || 2 * j + 1 < count ? codes.v[2 * j + 1] : 0u;  // padding is 0
    bytes.v[j] = static_cast<uint8_t>(codes.v[2 * j] | high << 4);
  }
  if constexpr (kWide) {
    *reinterpret_cast<Pair*>(p) = pack_pair(bytes.v);
  } else {
    store<uint8_t, 8, false>(p, bytes, (count + 1) / 2);
  }
}

template <int N>
EPI_KERNEL Pack<float, N> squares(const Pack<uint8_t, N>& codes, float scale) {
  Pack<float, N> x;
#pragma unroll
  for (int j = 0; j < N; ++j) x.v[j] = level(codes.v[j]) * scale;
  return x;
}
template <int N>
EPI_KERNEL Pack<float, N> averages(const Pack<uint8_t, N>& codes, float scale,
                                   const Pack<uint8_t, N>& square_codes) {
  Pack<float, N> x;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float units = magnitude(codes.v[j] & 7u) * scale;
    const float signed_units = math::float_of(math::bits_of(units) ^ (codes.v[j] & 8u) << 28);
    x.v[j] = signed_units * root(square_codes.v[j]);
  }
  return x;
}

// Stores a thread's 16 elements of a block; v becomes what a reader will see. `old`: the block's scale of
// exp_avg_sq. `random_average(j)`: 16 bits, `random_square(j)`: 23.
template <bool kWide, class Block, class RandomAverage, class RandomSquare>
EPI_KERNEL void store_moments(const Block& block, Nibbles* exp_avg, Nibbles* exp_avg_sq,
                              uint8_t* exp_avg_scale, uint8_t* exp_avg_sq_scale, int64_t start, int count,
                              float bound, float old, const Pack<float, 16>& m, Pack<float, 16>& v,
                              const RandomAverage& random_average, const RandomSquare& random_square) {
  const bool writes_scale = count > 0 && block.thread() % kGroup == 0;
  const int64_t at = start / math::kCodeBlock;
  Pack<uint8_t, 16> codes, square_codes;
  uint32_t top = 0;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const uint32_t word = magnitude_word<true>(v.v[j]);
    if ((kWide || j < count) && word > top) top = word;
  }
  const math::SquareGrid square = math::square_grid(block.group_max(top), math::bits_of(old));
  const bool finite = square.scale != math::kInfiniteScale;
  Pack<float, 16> scaled;
  top = 0;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const uint32_t code = finite ? math::square_code(v.v[j], square.gain, random_square(j)) : 15u;
    square_codes.v[j] = static_cast<uint8_t>(code);
    scaled.v[j] = math::float_of(magnitude_word<true>(m.v[j])) * inverse_root(code);
    const uint32_t word = magnitude_word<true>(scaled.v[j]);
    if ((kWide || j < count) && word > top) top = word;
  }
  const math::AverageGrid average = math::average_grid(block.group_max(top), bound, square.scale);
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const uint32_t code = math::average_code(m.v[j], scaled.v[j], average.inverse, random_average(j));
    codes.v[j] = static_cast<uint8_t>(average.scale != math::kNaNScale ? code : 0u);
  }
  store_nibbles<kWide>(exp_avg, start, codes, count);
  store_nibbles<kWide>(exp_avg_sq, start, square_codes, count);
  if (writes_scale) {
    reinterpret_cast<uint16_t*>(exp_avg_scale)[at] = static_cast<uint16_t>(average.scale >> 16);
    reinterpret_cast<uint16_t*>(exp_avg_sq_scale)[at] = static_cast<uint16_t>(square.scale >> 16);
  }
  v = squares(square_codes, math::float_of(square.scale));
}

}  // namespace epi::cuda
