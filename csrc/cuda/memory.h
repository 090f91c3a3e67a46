// N consecutive elements in registers, stored as float32 or bfloat16 (its word). The 16-byte accesses
// need pointers that the dispatcher has proved aligned.

#pragma once

#include "cuda/block.h"
#include "math/rounding.h"

namespace epi::cuda {

namespace math = epi::scalar;

#if defined(__CUDACC__)
using Quad = uint4;
#else
struct __attribute__((may_alias, aligned(16))) Quad {
  uint32_t x, y, z, w;
};
#endif

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

// N = 1: any pointer. Else N * sizeof(T) is a multiple of 16 and so is the address.
template <class T, int N>
EPI_KERNEL Pack<T, N> load(const T* p) {
  Pack<T, N> r;
  if constexpr (N == 1) {
    r.v[0] = *p;
  } else {
    constexpr int kPerQuad = 16 / static_cast<int>(sizeof(T));
    static_assert(N % kPerQuad == 0, "whole 16-byte accesses only");
    const Quad* q = reinterpret_cast<const Quad*>(p);
#pragma unroll
    for (int i = 0; i < N / kPerQuad; ++i) unpack(q[i], r.v + i * kPerQuad);
  }
  return r;
}

template <class T, int N>
EPI_KERNEL void store(T* p, const Pack<T, N>& r) {
  if constexpr (N == 1) {
    *p = r.v[0];
  } else {
    constexpr int kPerQuad = 16 / static_cast<int>(sizeof(T));
    Quad* q = reinterpret_cast<Quad*>(p);
#pragma unroll
    for (int i = 0; i < N / kPerQuad; ++i) q[i] = pack(r.v + i * kPerQuad);
  }
}

// float32 -> how T stores it. `random_bits`: 16 of them, used by bfloat16 alone.
template <class T>
EPI_KERNEL T narrow(float x, bool stochastic, uint32_t random_bits) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    return static_cast<T>(stochastic ? math::round_stochastic_bf16(x, random_bits)
                                     : math::round_nearest_bf16(x));
  }
}

}  // namespace epi::cuda
