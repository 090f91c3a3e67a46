// Two vectors that go through the same operations side by side. The order in which they are written is the
// order in which they reach the processor, and neither waits for the other.

#pragma once

#include "math/scalar.h"

namespace epi::EPI_ISA {

template <class H>
struct Twice {
  H a, b;
};
template <class H>
EPI_INLINE Twice<H> twice(H a, H b) {
  return {a, b};
}
template <class H>
EPI_INLINE Twice<H> twice(H both) {
  return {both, both};
}

template <class H>
struct Lanes<Twice<H>> {
  using U = Twice<typename Lanes<H>::U>;
  using M = Twice<typename Lanes<H>::M>;
  static EPI_INLINE Twice<H> f32(float x) { return twice(Lanes<H>::f32(x)); }
  static EPI_INLINE U u32(uint32_t x) { return twice(Lanes<H>::u32(x)); }
};

#define EPI_TWICE(name)                                        \
  template <class H>                                           \
  EPI_INLINE auto name(const Twice<H>& x, const Twice<H>& y) { \
    return twice(name(x.a, y.a), name(x.b, y.b));              \
  }
EPI_TWICE(operator+)
EPI_TWICE(operator-)
EPI_TWICE(operator*)
EPI_TWICE(operator/)
EPI_TWICE(operator&)
EPI_TWICE(operator|)
EPI_TWICE(operator^)
EPI_TWICE(operator==)
EPI_TWICE(operator<)
EPI_TWICE(operator>=)
EPI_TWICE(min)
EPI_TWICE(max)
EPI_TWICE(max_signed)
EPI_TWICE(max_unsigned)
EPI_TWICE(where_positive)
#undef EPI_TWICE

#define EPI_TWICE(name)                     \
  template <class H>                        \
  EPI_INLINE auto name(const Twice<H>& x) { \
    return twice(name(x.a), name(x.b));     \
  }
EPI_TWICE(operator!)
EPI_TWICE(sqrt_rn)
EPI_TWICE(bits_of)
EPI_TWICE(float_of)
EPI_TWICE(folded_halves)
#undef EPI_TWICE

template <class H>
EPI_INLINE Twice<H> operator>>(const Twice<H>& x, int count) {
  return twice(x.a >> count, x.b >> count);
}
template <class M, class V>
EPI_INLINE Twice<V> select(const Twice<M>& where, const Twice<V>& x, const Twice<V>& y) {
  return twice(select(where.a, x.a, y.a), select(where.b, x.b, y.b));
}
template <class H>
EPI_INLINE Twice<H> add_exact_product(const Twice<H>& x, const Twice<H>& y, const Twice<H>& z) {
  return twice(add_exact_product(x.a, y.a, z.a), add_exact_product(x.b, y.b, z.b));
}
template <class H>
EPI_INLINE auto lookup(const float (&table)[16], const Twice<H>& index) {
  return twice(lookup(table, index.a), lookup(table, index.b));
}
template <class M>
EPI_INLINE bool any(const Twice<M>& x) {
  return any(x.a | x.b);
}

}  // namespace epi::EPI_ISA
