"""From a threshold on scores to a bound on importances, once a layer instead of once an element.

The score does not decrease with u: a difference, a quotient by a positive number and a rounding each
keep the order. So "score >= s" is the same as "u >= bound" for the least finite u whose score reaches s,
and that one is found exactly by halving the range of float32 keys 32 times.
"""

from __future__ import annotations

import triton
import triton.language as tl

from epi_kernels.backends.triton.common import inlined, score, score_key

BOUNDS_BLOCK = 64  # layers a program


@inlined
def _key_to_float(key):  # [n] int64 in [0, 2^32)
    word = tl.where(key >= 0x80000000, key - 0x80000000, 0xFFFFFFFF - key)
    return word.to(tl.uint32).to(tl.float32, bitcast=True)


@inlined
def _least_importance(target, least_u_key, shift, scale, isolated, keep_factor, HYSTERESIS: tl.constexpr):
    """Least finite u, from ``least_u_key`` on, whose score's key reaches ``target``; +inf where none does."""
    low = least_u_key
    high = tl.zeros_like(target) + 0xFF800000  # key of +inf: one past the finite ones
    for _ in range(32):
        middle = (low + high) >> 1
        value = score(_key_to_float(middle), shift, scale, isolated, keep_factor, HYSTERESIS)
        reaches = score_key(value).to(tl.int64) >= target
        # once low == high == +inf nothing may move any more
        open_ = low < high
        high = tl.where(open_ & reaches, middle, high)
        low = tl.where(open_ & ~reaches, middle + 1, low)
    return _key_to_float(high)


@triton.jit(do_not_specialize=["layers"])
def count_bounds_kernel(
    bounds,  # [layers, 4] fp32, written
    shift,  # [layers] fp32
    scale,
    domain,  # [layers] int64
    lo,  # [domains] int64 key
    hi,
    layers,
    keep_factor,
    HYSTERESIS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The bracket [lo, hi) of every layer's domain, as bounds on u."""
    layer = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = layer < layers
    row = tl.load(domain + layer, mask=in_bounds, other=0)
    low_key, high_key = tl.load(lo + row, mask=in_bounds, other=0), tl.load(hi + row, mask=in_bounds, other=0)
    # padding lanes divide by 1
    shift_, scale_ = (
        tl.load(shift + layer, mask=in_bounds, other=0),
        tl.load(scale + layer, mask=in_bounds, other=1),
    )
    least = tl.zeros_like(low_key) + 0x00800000  # key of the least finite float32
    for isolated in tl.static_range(2):
        now = tl.full([BLOCK], isolated, tl.int1)
        low = _least_importance(low_key, least, shift_, scale_, now, keep_factor, HYSTERESIS)
        high = _least_importance(high_key, least, shift_, scale_, now, keep_factor, HYSTERESIS)
        tl.store(bounds + layer * 4 + isolated * 2, low, mask=in_bounds)
        tl.store(bounds + layer * 4 + isolated * 2 + 1, tl.maximum(low, high), mask=in_bounds)


@triton.jit(do_not_specialize=["layers"])
def select_bounds_kernel(
    bounds,  # [layers, 4] fp32, written; columns 1 and 3, the upper bounds, are +inf
    shift,  # [layers] fp32
    scale,
    thresholds,  # [layers] fp32
    layers,
    keep_factor,
    POSITIVE_ONLY: tl.constexpr,
    HYSTERESIS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The least u that is isolated: every condition of ``reference.mask`` is a lower bound on u."""
    layer = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = layer < layers
    threshold = tl.load(thresholds + layer, mask=in_bounds, other=float("inf"))
    shift_, scale_ = (
        tl.load(shift + layer, mask=in_bounds, other=0),
        tl.load(scale + layer, mask=in_bounds, other=1),
    )
    target = score_key(threshold).to(tl.int64)
    if POSITIVE_ONLY:
        target = tl.maximum(target, 0x80000001)  # key of the least positive score
    least = tl.zeros_like(target) + 0x80000001  # u > 0
    possible = (threshold < float("inf")) & (scale_ > 0)
    for isolated in tl.static_range(2):
        now = tl.full([BLOCK], isolated, tl.int1)
        low = _least_importance(target, least, shift_, scale_, now, keep_factor, HYSTERESIS)
        low = tl.where(possible, low, float("inf"))
        tl.store(bounds + layer * 4 + isolated * 2, low, mask=in_bounds)
        tl.store(bounds + layer * 4 + isolated * 2 + 1, tl.zeros_like(low) + float("inf"), mask=in_bounds)
