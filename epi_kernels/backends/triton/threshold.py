"""Stage 3, threshold: one counting pass into the histograms of a search.

Most elements cost two comparisons with their layer's bounds on u. Only a block that holds an element
inside the bracket computes scores; few such elements go to the histogram one by one, many through a
histogram of the block in shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from epi_kernels.backends.triton.common import (
    load_address,
    load_bits,
    load_block,
    load_mask_address,
    mask_rows,
    score,
    score_key,
    widen,
)
from epi_kernels.backends.triton.stats import ISOLATION_MASK, REFRESH_ROW, U_LAYER, U

_U, _ISOLATION_MASK = tl.constexpr(U), tl.constexpr(ISOLATION_MASK)
_U_LAYER, _REFRESH_ROW = tl.constexpr(U_LAYER), tl.constexpr(REFRESH_ROW)


@triton.jit
def _count_block(
    u,
    isolated,
    in_bounds,
    low_0,
    high_0,
    low_1,
    high_1,
    shift,
    scale,
    keep_factor,
    lo,
    bin_shift,
    histogram,
    above,
    HYSTERESIS: tl.constexpr,
    BOUNDED: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
):
    low = low_0
    high = high_0
    if HYSTERESIS:
        low = tl.where(isolated, low_1, low_0)
        high = tl.where(isolated, high_1, high_0)
    finite = u < float("inf")  # the bounds are finite or +inf: -inf and NaN fail the others
    over = (u >= high) & finite
    inside = (u >= low) & (u < high)
    if BOUNDED:
        over = over & in_bounds
        inside = inside & in_bounds
    above += over.to(tl.int32)
    n_inside = tl.sum(tl.sum(inside.to(tl.int32), 1), 0)
    if n_inside > 0:
        key = score_key(score(u, shift, scale, isolated, keep_factor, HYSTERESIS))
        column = tl.where(inside, (key - lo) >> bin_shift, 0).to(tl.int32)
        if n_inside * 32 < ROWS * 8:
            ones = tl.full([ROWS, 8], 1, tl.int64)
            tl.atomic_add(histogram + column, ones, mask=inside, sem="relaxed")
        else:
            flat = tl.reshape(column, [ROWS * 8])
            counts = tl.histogram(flat, BINS, mask=tl.reshape(inside, [ROWS * 8]))
            bins = histogram + tl.arange(0, BINS)
            tl.atomic_add(bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    return above


@triton.jit(do_not_specialize=["stride"])
def count_kernel(
    chunks,  # [programs, 4] int64; starts and counts are of the sampled elements
    tensors,  # [tensors, REFRESH_ROW] int64
    bounds,  # [layers, 4] fp32
    shift,  # [layers] fp32
    scale,
    domain,  # [layers] int64
    lo,  # [domains] int64
    bin_shifts,  # [domains] int64
    done,  # [domains] uint8
    histogram,  # [domains, BINS + 1] int64, added to
    stride,  # every stride-th run of 64 elements is counted
    keep_factor,
    BF16: tl.constexpr,
    ALIGNED: tl.constexpr,
    HYSTERESIS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
):
    chunk = chunks + tl.program_id(0) * 4
    row = tensors + tl.load(chunk) * _REFRESH_ROW
    layer = tl.load(row + _U_LAYER)
    search = tl.load(domain + layer)
    if tl.load(done + search) == 0:
        start = tl.multiple_of(tl.load(chunk + 1), 64)
        count = tl.load(chunk + 2).to(tl.int32)
        u_first = load_address(row + _U, BF16, ALIGNED)
        mask_bytes = load_mask_address(row + _ISOLATION_MASK)
        mask_limit = mask_rows(row + _ISOLATION_MASK, ROWS)
        layer_bounds = bounds + layer * 4
        low_0, high_0 = tl.load(layer_bounds), tl.load(layer_bounds + 1)
        low_1, high_1 = tl.load(layer_bounds + 2), tl.load(layer_bounds + 3)
        shift_, scale_ = tl.load(shift + layer), tl.load(scale + layer)
        lo_ = tl.load(lo + search).to(tl.uint32)
        bin_shift = tl.load(bin_shifts + search).to(tl.uint32)
        target = histogram + search * (BINS + 1)

        # a row of 8 elements; 8 rows are a run of 64, and stride runs lie between two counted ones
        BLOCK: tl.constexpr = ROWS * 8
        rows = tl.arange(0, ROWS)[:, None]
        columns = tl.arange(0, 8)[None, :]
        mask_offsets = (rows >> 3) * (stride * 8) + (rows & 7)
        offsets = (rows >> 3) * (stride * 64) + (rows & 7) * 8 + columns
        isolated = tl.full([ROWS, 8], 0, tl.int1)
        above = tl.zeros([ROWS, 8], tl.int32)
        full_blocks = count // BLOCK
        for i in range(full_blocks):
            first = (start + i * BLOCK) * stride
            u = widen(tl.load(u_first + first + offsets), BF16)
            if HYSTERESIS:
                bits = load_bits(mask_bytes + (first >> 3) + mask_offsets, rows, mask_limit)
                isolated = ((bits >> columns) & 1) != 0
            above = _count_block(
                u, isolated, True, low_0, high_0, low_1, high_1, shift_, scale_, keep_factor,
                lo_, bin_shift, target, above, HYSTERESIS, False, BINS, ROWS,
            )  # fmt: skip
        passed = full_blocks * BLOCK
        if passed < count:
            first = (start + passed) * stride
            in_bounds = rows * 8 + columns < count - passed
            u = widen(load_block(u_first + first + offsets, in_bounds, True), BF16)
            if HYSTERESIS:
                mask_limit = tl.minimum(mask_limit, (count - passed + 7) // 8)
                bits = load_bits(mask_bytes + (first >> 3) + mask_offsets, rows, mask_limit)
                isolated = ((bits >> columns) & 1) != 0
            above = _count_block(
                u, isolated, in_bounds, low_0, high_0, low_1, high_1, shift_, scale_, keep_factor,
                lo_, bin_shift, target, above, HYSTERESIS, True, BINS, ROWS,
            )  # fmt: skip
        n_above = tl.sum(tl.sum(above, 1), 0)
        if n_above > 0:
            tl.atomic_add(target + BINS, n_above.to(tl.int64), sem="relaxed")
