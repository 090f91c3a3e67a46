// Stage 4, mask: one comparison with a bound on u an element; whole bytes are written and the drift
// is counted by popcounts of the packed bits.

#pragma once

#include "cpu/codes.h"

namespace epi::EPI_ISA {

// Bounds on u as numbers and as bfloat16 words; they are positive. [1]: isolated elements.
template <class F>
struct SelectBounds {
  F bound[2];
  int word[2];
  bool by_old_bit;
};

// Bits of the sixty-four elements at `u`.
template <class F>
EPI_INLINE uint64_t selected(const float* u, uint64_t old, const SelectBounds<F>& b) {
  using L = Lanes<F>;
  using M = typename L::M;
  const F infinity = L::f32(float_of(0x7F800000u));
  uint64_t now = 0;
  for (int j = 0; j < 64; j += kWidth) {
    const F x = load<F>(u + j);
    F bound = b.bound[0];
    if (b.by_old_bit) bound = select(from_bits<M>((old >> j) & 0xFFFFu), b.bound[1], bound);
    now |= static_cast<uint64_t>(to_bits((x >= bound) & (x < infinity))) << j;
  }
  return now;
}

template <class F>
EPI_INLINE uint64_t selected(const uint16_t* u, uint64_t old, const SelectBounds<F>& b) {
  uint64_t now = finite_from(u, b.word[0]);
  now |= static_cast<uint64_t>(finite_from(u + 32, b.word[0])) << 32;
  if (!b.by_old_bit || old == 0) return now;
  uint64_t stays = finite_from(u, b.word[1]);
  stays |= static_cast<uint64_t>(finite_from(u + 32, b.word[1])) << 32;
  return (stays & old) | (now & ~old);
}

// The elements from `i` on, `count` of at most sixty-four, in `space` where they cannot be read in place.
template <class T>
struct Importances {
  const T* u;
  EPI_INLINE Importances(TableRow row) : u(importances<T>(row)) {}
  EPI_INLINE const T* at(T* space, int64_t i, int count) const {
    if (count == 64) [[likely]]
      return u + i;
    for (int j = 0; j < 64; ++j) space[j] = j < count ? u[i + j] : T{};
    return space;
  }
};
struct ExpandedImportances : CodedImportance {
  EPI_INLINE ExpandedImportances(TableRow row) : CodedImportance(row) {}
  EPI_INLINE const uint16_t* at(uint16_t* space, int64_t i, int count) const {
    for (int j = count; j < 64; ++j) space[j] = 0;
    read(space, i, count);
    return space;
  }
};

template <class F, class T, class Read>
EPI_INLINE void select_range(TableRow row, int64_t start, int64_t stop, SelectArguments& a) {
  const Read u(row);
  uint8_t* mask = pointer<uint8_t>(row, kIsolationMask);
  const uint8_t* persistent = pointer<const uint8_t>(row, kPersistentMask);
  const SelectBounds<F> b{{Lanes<F>::f32(a.bound[0]), Lanes<F>::f32(a.bound[1])},
                          {bf16_bound(a.bound[0]), bf16_bound(a.bound[1])},
                          a.by_old_bit};
  int64_t isolated = 0, entered = 0, released = 0;
  for (int64_t i = start; i < stop; i += 64) {
    const int count = stop - i < 64 ? static_cast<int>(stop - i) : 64;
    const uint64_t in_bounds = count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    T space[64];
    const T* at = u.at(space, i, count);
    uint64_t old, kept;
    if (count == 64) [[likely]] {
      old = mask_word<uint64_t>(mask, i);
      kept = mask_word<uint64_t>(persistent, i);
    } else {
      old = mask_bits<uint64_t>(mask, i, count) & in_bounds;
      kept = mask_bits<uint64_t>(persistent, i, count);
    }
    const uint64_t now = (selected(at, old, b) | kept) & in_bounds;
    if (count == 64) [[likely]] {
      memcpy(mask + i / 8, &now, 8);
    } else {
      for (int j = 0; 8 * j < count; ++j) mask[i / 8 + j] = static_cast<uint8_t>(now >> 8 * j);
    }
    isolated += __builtin_popcountll(now);
    entered += __builtin_popcountll(now & ~old);
    released += __builtin_popcountll(old & ~now);
  }
  a.drift[0] += isolated;
  a.drift[1] += entered;
  a.drift[2] += released;
}

template <class F>
void select_mask(TableRow row, int64_t start, int64_t stop, SelectArguments& a) {
  if ((row[kFlags] & kUInt8) != 0) {
    select_range<F, uint16_t, ExpandedImportances>(row, start, stop, a);
  } else if ((row[kFlags] & kUBf16) != 0) {
    select_range<F, uint16_t, Importances<uint16_t>>(row, start, stop, a);
  } else {
    select_range<F, float, Importances<float>>(row, start, stop, a);
  }
}

}  // namespace epi::EPI_ISA
