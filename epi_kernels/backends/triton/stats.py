"""Stage 2, stats: extrema, non-finite counts and moments of the importances, layer by layer.

Extrema and counts are merged with atomics: they do not depend on an order. The float64 moments of
zscore do, so each chunk writes its own and a second kernel adds them up in the chunks' order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from epi_kernels.backends.triton.codec import scale_offsets
from epi_kernels.backends.triton.common import inlined, is_finite, load_address
from epi_kernels.backends.triton.nibbles import first_element, load_importances, load_scale_address

NO_STATS, EXTREMA, WITH_MOMENTS = 0, 1, 2

# Columns of a tensor's row in the tables of a refresh, int64; the other stages read them too.
U, ISOLATION_MASK, PERSISTENT_MASK, U_LAYER, U_SCALE = range(5)
REFRESH_ROW = 5
WIDTH = 8  # elements of a row in the kernels that read u

_WITH_MOMENTS = tl.constexpr(WITH_MOMENTS)
_U, _U_LAYER, _REFRESH_ROW = tl.constexpr(U), tl.constexpr(U_LAYER), tl.constexpr(REFRESH_ROW)
_U_SCALE, _WIDTH = tl.constexpr(U_SCALE), tl.constexpr(WIDTH)


@inlined
def accumulators(ROWS: tl.constexpr, STATS: tl.constexpr):
    """One of each kind a row of a block; the fp64 ones, dear in registers, only where they are used."""
    MOMENT_ROWS: tl.constexpr = ROWS if STATS == _WITH_MOMENTS else 1
    lowest = tl.full([ROWS], float("inf"), tl.float32)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    strange = tl.zeros([ROWS], tl.int32)
    total = tl.zeros([MOMENT_ROWS], tl.float64)
    squares = tl.zeros([MOMENT_ROWS], tl.float64)
    return lowest, highest, strange, total, squares


@inlined
def fold(
    u,
    in_bounds,
    lowest,
    highest,
    strange,
    total,
    squares,
    FULL: tl.constexpr,
    STATS: tl.constexpr,
):
    """Takes a block of importances into the accumulators, row by row."""
    counted = is_finite(u)
    odd = (~counted).to(tl.int32)
    if not FULL:
        counted = counted & in_bounds
        odd = tl.where(in_bounds, odd, 0)
    lowest = tl.minimum(lowest, tl.min(tl.where(counted, u, float("inf")), 1))
    highest = tl.maximum(highest, tl.max(tl.where(counted, u, float("-inf")), 1))
    strange += tl.sum(odd, 1)
    if STATS == _WITH_MOMENTS:
        wide = tl.where(counted, u, 0.0).to(tl.float64)
        total += tl.sum(wide, 1)
        squares += tl.sum(wide * wide, 1)
    return lowest, highest, strange, total, squares


@inlined
def publish(
    lowest,
    highest,
    strange,
    total,
    squares,
    minimum,
    maximum,
    nonfinite,
    partials,
    slot,  # where the chunk's slot is written
    STATS: tl.constexpr,
):
    """Merges a program's accumulators into its layer's row, its moments into the chunk's own slot."""
    tl.atomic_min(minimum, tl.min(lowest, 0), sem="relaxed")
    tl.atomic_max(maximum, tl.max(highest, 0), sem="relaxed")
    odd = tl.sum(strange, 0)
    if odd > 0:
        tl.atomic_add(nonfinite, odd.to(tl.int64), sem="relaxed")
    if STATS == _WITH_MOMENTS:
        own = partials + tl.load(slot) * 2
        tl.store(own, tl.sum(total, 0))
        tl.store(own + 1, tl.sum(squares, 0))


@triton.jit
def stats_kernel(
    chunks,  # [programs, 4] int64
    tensors,  # [tensors, REFRESH_ROW] int64
    minimum,  # [layers] fp32
    maximum,
    nonfinite,  # [layers] int64
    partials,  # [chunks, 2] fp64
    KIND: tl.constexpr,
    FULL: tl.constexpr,
    STATS: tl.constexpr,
    ROWS: tl.constexpr,
):
    chunk = chunks + tl.program_id(0) * 4
    row = tensors + tl.load(chunk) * _REFRESH_ROW
    start = tl.multiple_of(tl.load(chunk + 1), 64)
    count = tl.load(chunk + 2).to(tl.int32)
    u_first = first_element(load_address(row + _U, KIND, FULL), start, KIND)
    u_scale = load_scale_address(row + _U_SCALE, KIND) + (start >> 6)
    layer = tl.load(row + _U_LAYER)

    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, _WIDTH)[None, :]
    lowest, highest, strange, total, squares = accumulators(ROWS, STATS)
    for begin in range(0, count, ROWS * _WIDTH):
        offsets = begin + rows * _WIDTH + columns
        in_bounds = offsets < count
        scale_at = scale_offsets(begin, rows, _WIDTH)
        row_in_bounds = begin + rows * _WIDTH < count
        u = load_importances(u_first, offsets, u_scale, scale_at, in_bounds, row_in_bounds, KIND, FULL)
        lowest, highest, strange, total, squares = fold(
            u, in_bounds, lowest, highest, strange, total, squares, FULL, STATS
        )
    publish(
        lowest, highest, strange, total, squares, minimum + layer, maximum + layer, nonfinite + layer,
        partials, chunk + 3, STATS,
    )  # fmt: skip


@triton.jit
def merge_moments_kernel(
    spans,  # [programs, 4] int64: a layer's row, its first slot, one past its last, unused
    partials,  # [chunks, 2] fp64
    moments,  # [layers, 2] fp64
    BLOCK: tl.constexpr,
):
    span = spans + tl.program_id(0) * 4
    layer, first, end = tl.load(span), tl.load(span + 1), tl.load(span + 2)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    for slot in range(first, end, BLOCK):
        in_bounds = slot + lanes < end
        total += tl.load(partials + (slot + lanes) * 2, mask=in_bounds, other=0.0)
        squares += tl.load(partials + (slot + lanes) * 2 + 1, mask=in_bounds, other=0.0)
    tl.store(moments + layer * 2, tl.load(moments + layer * 2) + tl.sum(total, 0))
    tl.store(moments + layer * 2 + 1, tl.load(moments + layer * 2 + 1) + tl.sum(squares, 0))
