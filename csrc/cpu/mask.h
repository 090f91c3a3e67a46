// Stage 4, mask: one comparison with a bound on u an element; whole bytes are written and the drift
// is counted by popcounts of the packed bits.

#pragma once

#include "cpu/code_blocks.h"

namespace epi::EPI_ISA {

// Bounds on u as numbers and as bfloat16 words; they are positive. [1]: isolated elements.
template <class F>
struct SelectBounds {
  float number[2];
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
  if (!b.by_old_bit) old = 0;
  return finite_from(u, b.word, static_cast<uint32_t>(old)) |
         static_cast<uint64_t>(finite_from(u + 32, b.word, static_cast<uint32_t>(old >> 32))) << 32;
}

// The sixty-four elements from `i` on, of which `count` exist; a place for those that are not codes.
template <class T>
struct Floats {
  const T* u;

  template <class F>
  EPI_INLINE uint64_t selected_at(int64_t i, int count, uint64_t old, const SelectBounds<F>& b) const {
    const T* at = u + i;
    ahead<64>(at, kReadAhead);
    T rest[64];
    if (count < 64) [[unlikely]]
      at = padded(rest, at, count);
    return selected(at, old, b);
  }
};
// Bits of a block of codes.
template <class Codes>
struct Coded {
  Codes u;

  template <class F>
  EPI_INLINE uint64_t selected_at(int64_t i, int count, uint64_t old, const SelectBounds<F>& b) const {
    uint8_t space[kCodeBlock];
    ahead<32>(static_cast<const uint8_t*>(u.address(i)), kReadAhead);
    const auto block = u.block(i, count, space);
    const uint64_t now = block.from(b.number[0]);
    if (!b.by_old_bit || old == 0) return now;
    return (block.from(b.number[1]) & old) | (now & ~old);
  }
};

template <class F, class Source>
EPI_INLINE void select_range(const Source& source, TableRow row, int64_t start, int64_t stop,
                             SelectArguments& a) {
  uint8_t* mask = pointer<uint8_t>(row, kIsolationMask);
  const uint8_t* persistent = pointer<const uint8_t>(row, kPersistentMask);
  const SelectBounds<F> b{{a.bound[0], a.bound[1]},
                          {Lanes<F>::f32(a.bound[0]), Lanes<F>::f32(a.bound[1])},
                          {bf16_bound(a.bound[0]), bf16_bound(a.bound[1])},
                          a.by_old_bit};
  int64_t isolated = 0, entered = 0, released = 0;
  for (int64_t i = start; i < stop; i += 64) {
    const int count = stop - i < 64 ? static_cast<int>(stop - i) : 64;
    const uint64_t in_bounds = count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    uint64_t old, kept;
    if (count == 64) [[likely]] {
      old = mask_word<uint64_t>(mask, i);
      kept = mask_word<uint64_t>(persistent, i);
    } else {
      old = mask_bits<uint64_t>(mask, i, count) & in_bounds;
      kept = mask_bits<uint64_t>(persistent, i, count);
    }
    const uint64_t now = (source.selected_at(i, count, old, b) | kept) & in_bounds;
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
    select_range<F>(Coded<ByteCodes>{byte_codes(row)}, row, start, stop, a);
  } else if ((row[kFlags] & kUInt4) != 0) {
    select_range<F>(Coded<NibbleCodes>{nibble_codes(row)}, row, start, stop, a);
  } else if ((row[kFlags] & kUBf16) != 0) {
    select_range<F>(Floats<uint16_t>{importances<uint16_t>(row)}, row, start, stop, a);
  } else {
    select_range<F>(Floats<float>{importances<float>(row)}, row, start, stop, a);
  }
}

}  // namespace epi::EPI_ISA
