// Reading a row of the pointer table, and tails: a range's last elements are copied into a full
// vector's worth of local memory, so that every kernel has one body.

#pragma once

#include "cpu/kernels.h"

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

// Bytes ahead of the reads at which cache lines are asked for, since the hardware's prefetchers stop
// at every page. float32, beside torch's fused step over 1e8 elements, medians of 54 pairs, three to six runs
// each on two cores with AVX-512: 0.94-1.01 with 1024, 1.00-1.02 with 768, 1.02-1.10 with 512, 1.01-1.02 with
// 256.
constexpr int64_t kPrefetchBytes = 1024;

template <int kElements, class T>
EPI_INLINE void ahead(const T* p, int64_t bytes = kPrefetchBytes) {
  const char* line = reinterpret_cast<const char*>(p) + bytes;
  for (size_t i = 0; i < sizeof(T) * kElements; i += 64) __builtin_prefetch(line + i);
}

// Of a stage that reads one stream: a refresh of 1e8 float32 elements takes 22 ms, with 1024 24.6.
constexpr int64_t kReadAhead = 4096;

// u as stored: the row's own importance, or the shared second moment.
template <class T>
EPI_INLINE const T* importances(TableRow row) {
  return pointer<const T>(row, row[kImportance] != 0 ? kImportance : kExpAvgSq);
}

// The scales of u's codes.
EPI_INLINE const uint8_t* importance_scales(TableRow row) {
  return pointer<const uint8_t>(row, row[kImportance] != 0 ? kImportanceScale : kExpAvgSqScale);
}

// Packed bits of the `count` (at most 64) elements from `start` on, a multiple of 8; reads only the
// bytes that hold them.
template <class Word = uint32_t>
EPI_INLINE Word mask_bits(const uint8_t* mask, int64_t start, int count) {
  Word bits = 0;
  if (mask == nullptr) return bits;
  for (int i = 0; 8 * i < count; ++i) bits |= static_cast<Word>(mask[start / 8 + i]) << 8 * i;
  return bits;
}

// A whole word of them.
template <class Word = uint32_t>
EPI_INLINE Word mask_word(const uint8_t* mask, int64_t start) {
  Word bits = 0;
  if (mask != nullptr) memcpy(&bits, mask + (start >> 3), sizeof bits);
  return bits;
}

template <int kElements>
struct PairBitsOf;
template <>
struct PairBitsOf<32> {
  using type = uint32_t;
};
template <>
struct PairBitsOf<16> {
  using type = uint16_t;
};

template <class T>
EPI_INLINE void copy(T* to, const T* from, int count) {
  for (int i = 0; i < count; ++i) to[i] = from[i];
}

// The last `count` elements of a range, followed by `filler`.
template <class T, size_t kSize>
EPI_INLINE const T* padded(T (&space)[kSize], const T* from, int count, T filler = {}) {
  for (int i = 0; i < static_cast<int>(kSize); ++i) space[i] = i < count ? from[i] : filler;
  return space;
}

}  // namespace epi::EPI_ISA
