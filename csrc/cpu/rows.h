// Reading a row of the pointer table, and tails: a range's last elements are copied into a full
// vector's worth of local memory, so that every kernel has one body.

#pragma once

#include "cpu/kernels.h"
#include "math/platform.h"

namespace epi::EPI_ISA {

constexpr int kWidth = 16;

template <class T>
EPI_INLINE T* pointer(TableRow row, int column) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(row[column]));
}

template <bool kBf16>
struct Stored {
  using type = float;
};
template <>
struct Stored<true> {
  using type = uint16_t;
};
template <bool kBf16>
using stored_t = typename Stored<kBf16>::type;

// u as stored: the row's own importance, or the shared second moment.
template <class T>
EPI_INLINE const T* importances(TableRow row) {
  return pointer<const T>(row, row[kImportance] != 0 ? kImportance : kExpAvgSq);
}

// Packed bits of the sixteen elements from `start` on; reads only the bytes that hold `count` bits.
EPI_INLINE uint32_t mask_bits(const uint8_t* mask, int64_t start, int count = kWidth) {
  if (mask == nullptr) return 0;
  const uint8_t* bytes = mask + start / 8;
  return bytes[0] | (count > 8 ? static_cast<uint32_t>(bytes[1]) << 8 : 0u);
}

template <class T>
EPI_INLINE void copy(T* to, const T* from, int count) {
  for (int i = 0; i < count; ++i) to[i] = from[i];
}

// The last `count` elements of a range, followed by zeros.
template <class T>
EPI_INLINE const T* padded(T* space, const T* from, int count) {
  for (int i = 0; i < kWidth; ++i) space[i] = i < count ? from[i] : T{};
  return space;
}

}  // namespace epi::EPI_ISA
