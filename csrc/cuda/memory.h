// N consecutive elements in registers, stored as float32, bfloat16 (its word) or 8-bit codes. The wide
// accesses need pointers that the dispatcher has proved aligned.

#pragma once

#include "cuda/block.h"
#include "cuda/codec.h"
#include "math/rounding.h"

namespace epi::cuda {

#if defined(__CUDACC__)
using Pair = uint2;
using Quad = uint4;
#else
struct __attribute__((may_alias, aligned(8))) Pair {
  uint32_t x, y;
};
struct __attribute__((may_alias, aligned(16))) Quad {
  uint32_t x, y, z, w;
};
#endif

template <class T>
constexpr bool kCodes = sizeof(T) == 1;

EPI_KERNEL float widen(float x) {
  return x;
}
EPI_KERNEL float widen(uint16_t word) {
  return math::float_of(static_cast<uint32_t>(word) << 16);
}

// N elements as they lie in memory.
template <class T, int N>
struct Pack {
  T v[N];
};

EPI_KERNEL void unpack(const Quad& q, float* v) {
  v[0] = math::float_of(q.x);
  v[1] = math::float_of(q.y);
  v[2] = math::float_of(q.z);
  v[3] = math::float_of(q.w);
}
EPI_KERNEL void unpack(const Quad& q, uint16_t* v) {
  const uint32_t words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = static_cast<uint16_t>(words[i]);
    v[2 * i + 1] = static_cast<uint16_t>(words[i] >> 16);
  }
}
EPI_KERNEL void unpack(uint32_t word, uint8_t* v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = static_cast<uint8_t>(word >> (8 * i));
}
EPI_KERNEL void unpack(const Pair& p, uint8_t* v) {
  unpack(p.x, v);
  unpack(p.y, v + 4);
}
EPI_KERNEL void unpack(const Quad& q, uint8_t* v) {
  unpack(Pair{q.x, q.y}, v);
  unpack(Pair{q.z, q.w}, v + 8);
}
EPI_KERNEL Quad pack(const float* v) {
  return {math::bits_of(v[0]), math::bits_of(v[1]), math::bits_of(v[2]), math::bits_of(v[3])};
}
EPI_KERNEL Quad pack(const uint16_t* v) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = static_cast<uint32_t>(v[2 * i]) | static_cast<uint32_t>(v[2 * i + 1]) << 16;
  }
  return {words[0], words[1], words[2], words[3]};
}

EPI_KERNEL Pair pack_pair(const uint8_t* v) {
  uint32_t words[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    words[i] = static_cast<uint32_t>(v[4 * i]) | static_cast<uint32_t>(v[4 * i + 1]) << 8 |
               static_cast<uint32_t>(v[4 * i + 2]) << 16 | static_cast<uint32_t>(v[4 * i + 3]) << 24;
  }
  return {words[0], words[1]};
}
EPI_KERNEL Quad pack(const uint8_t* v) {
  const Pair low = pack_pair(v), high = pack_pair(v + 8);
  return {low.x, low.y, high.x, high.y};
}

// kWide: N * sizeof(T) is 8 or a multiple of 16, and so is the address. Else any pointer, and only the
// first `count` elements are touched; the others are 0.
template <class T, int N, bool kWide>
EPI_KERNEL Pack<T, N> load(const T* p, int count = N) {
  Pack<T, N> r;
  if constexpr (!kWide) {
#pragma unroll
    for (int i = 0; i < N; ++i) r.v[i] = i < count ? p[i] : T{};
  } else if constexpr (N * sizeof(T) == sizeof(Pair)) {
    unpack(*reinterpret_cast<const Pair*>(p), r.v);
  } else {
    constexpr int kPerQuad = 16 / static_cast<int>(sizeof(T));
    static_assert(N % kPerQuad == 0, "whole 16-byte accesses only");
    const Quad* q = reinterpret_cast<const Quad*>(p);
#pragma unroll
    for (int i = 0; i < N / kPerQuad; ++i) unpack(q[i], r.v + i * kPerQuad);
  }
  return r;
}

template <class T, int N, bool kWide>
EPI_KERNEL void store(T* p, const Pack<T, N>& r, int count = N) {
  if constexpr (!kWide) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) p[i] = r.v[i];
    }
  } else {
    constexpr int kPerQuad = 16 / static_cast<int>(sizeof(T));
    static_assert(N % kPerQuad == 0, "whole 16-byte accesses only");
    Quad* q = reinterpret_cast<Quad*>(p);
#pragma unroll
    for (int i = 0; i < N / kPerQuad; ++i) q[i] = pack(r.v + i * kPerQuad);
  }
}

// The scale of the codes at `start`, of which there are `count`; 0 where T is no code.
template <class T>
EPI_KERNEL uint32_t load_scale(const uint8_t* scales, int64_t start, int64_t count = 1) {
  return kCodes<T> && count > 0 ? scales[start / math::kCodeBlock] : 0u;
}

template <bool kSigned, class T, int N>
EPI_KERNEL Pack<float, N> values(const Pack<T, N>& r, uint32_t scale) {
  Pack<float, N> x;
  if constexpr (kCodes<T>) {
    const float factor = math::Block<kSigned>::of_scale(scale).factor();
#pragma unroll
    for (int i = 0; i < N; ++i) x.v[i] = decode<kSigned>(r.v[i], factor);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x.v[i] = widen(r.v[i]);
  }
  return x;
}

// float32 -> how T stores it, no codes. `random_bits` of bfloat16 as math::switched_word takes them.
template <class T>
EPI_KERNEL T narrow(float x, uint32_t random_bits, uint32_t to_nearest) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    return static_cast<T>(math::switched_word(x, random_bits, to_nearest) >> 16);
  }
}

}  // namespace epi::cuda
