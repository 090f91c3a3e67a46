"""Stage 3, threshold: one counting pass into the histograms of a search.

Most elements cost two comparisons with their layer's bounds on u. Only a block that holds an element
inside the bracket computes scores; few such elements go to the histogram one by one, many through a
histogram of the block in shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from epi_kernels.backends.triton.common import (
    bytes_present,
    inlined,
    load_address,
    load_bits,
    load_byte_address,
    score,
    score_key,
)
from epi_kernels.backends.triton.nibbles import load_importances, load_scale_address
from epi_kernels.backends.triton.stats import ISOLATION_MASK, REFRESH_ROW, U_LAYER, U_SCALE, U

_U, _ISOLATION_MASK = tl.constexpr(U), tl.constexpr(ISOLATION_MASK)
_U_LAYER, _U_SCALE = tl.constexpr(U_LAYER), tl.constexpr(U_SCALE)
_REFRESH_ROW = tl.constexpr(REFRESH_ROW)


@inlined
def _into_histogram(
    u,
    isolated,
    inside,
    n_inside,
    shift,
    scale,
    keep_factor,
    lo,
    bin_shift,
    histogram,
    HYSTERESIS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Counts the elements of a block that are inside the bracket, by their scores."""
    key = score_key(score(u, shift, scale, isolated, keep_factor, HYSTERESIS))
    column = tl.where(inside, (key - lo) >> bin_shift, 0).to(tl.int32)
    if n_inside * 32 < ROWS * 8:
        ones = tl.full([ROWS, 8], 1, tl.int64)
        tl.atomic_add(histogram + column, ones, mask=inside, sem="relaxed")
    else:
        flat, counted = tl.reshape(column, [ROWS * 8]), tl.reshape(inside, [ROWS * 8])
        counts = tl.histogram(flat, BINS, mask=counted)
        tl.atomic_add(histogram + tl.arange(0, BINS), counts.to(tl.int64), mask=counts > 0, sem="relaxed")


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
    KIND: tl.constexpr,
    FULL: tl.constexpr,
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
        u_first = load_address(row + _U, KIND, FULL)
        u_scale = load_scale_address(row + _U_SCALE, KIND)
        mask_bytes = load_byte_address(row + _ISOLATION_MASK)
        mask_rows = bytes_present(row + _ISOLATION_MASK, count, FULL)
        low, high = tl.load(bounds + layer * 4), tl.load(bounds + layer * 4 + 1)
        low_isolated, high_isolated = tl.load(bounds + layer * 4 + 2), tl.load(bounds + layer * 4 + 3)
        shift_, scale_ = tl.load(shift + layer), tl.load(scale + layer)
        lo_ = tl.load(lo + search).to(tl.uint32)
        bin_shift = tl.load(bin_shifts + search).to(tl.uint32)
        target = histogram + search * (BINS + 1)

        # a row is 8 elements, 8 rows are a run of 64, and stride runs lie between two that are counted
        rows = tl.arange(0, ROWS)[:, None]
        columns = tl.arange(0, 8)[None, :]
        bytes_ = (rows >> 3) * (stride * 8) + (rows & 7)
        elements = (rows >> 3) * (stride * 64) + (rows & 7) * 8 + columns
        isolated = tl.full([ROWS, 8], 0, tl.int1)
        above = tl.zeros([ROWS, 8], tl.int32)
        for begin in range(0, count, ROWS * 8):
            first = (start + begin) * stride
            in_bounds = begin + rows * 8 + columns < count
            scale_at = (first >> 6) + (rows >> 3) * stride
            row_in_bounds = begin + rows * 8 < count
            offsets = first + elements
            u = load_importances(u_first, offsets, u_scale, scale_at, in_bounds, row_in_bounds, KIND, FULL)
            least = low
            end = high
            if HYSTERESIS:
                bits = load_bits(mask_bytes + (first >> 3) + bytes_, begin // 8 + rows, mask_rows)
                isolated = ((bits >> columns) & 1) != 0
                least = tl.where(isolated, low_isolated, low)
                end = tl.where(isolated, high_isolated, high)
            # the bounds are finite or +inf, and no NaN passes a comparison
            over = (u >= end) & (u < float("inf"))
            inside = (u >= least) & (u < end)
            if not FULL:
                over = over & in_bounds
                inside = inside & in_bounds
            above += over.to(tl.int32)
            n_inside = tl.sum(tl.sum(inside.to(tl.int32), 1), 0)
            if n_inside > 0:
                _into_histogram(
                    u, isolated, inside, n_inside, shift_, scale_, keep_factor, lo_, bin_shift, target,
                    HYSTERESIS, BINS, ROWS,
                )  # fmt: skip
        n_above = tl.sum(tl.sum(above, 1), 0)
        if n_above > 0:
            tl.atomic_add(target + BINS, n_above.to(tl.int64), sem="relaxed")
