"""Stage 4, mask: writes whole mask bytes by one comparison an element and counts what changed."""

from __future__ import annotations

import triton
import triton.language as tl

from epi_kernels.backends.triton.common import (
    load_address,
    load_bits,
    load_block,
    load_mask_address,
    mask_rows,
    widen,
)
from epi_kernels.backends.triton.stats import (
    ISOLATION_MASK,
    PERSISTENT_MASK,
    REFRESH_ROW,
    U_LAYER,
    U,
)

_U, _ISOLATION_MASK = tl.constexpr(U), tl.constexpr(ISOLATION_MASK)
_PERSISTENT_MASK, _U_LAYER = tl.constexpr(PERSISTENT_MASK), tl.constexpr(U_LAYER)
_REFRESH_ROW = tl.constexpr(REFRESH_ROW)


@triton.jit
def _popcounts(word):
    """Set bits of each of the three lower bytes of an int32, in place."""
    word = word - ((word >> 1) & 0x555555)
    word = (word & 0x333333) + ((word >> 2) & 0x333333)
    return (word + (word >> 4)) & 0x0F0F0F


@triton.jit
def _select_block(
    u,
    old,
    persistent,
    in_bounds,
    low_0,
    low_1,
    mask_bytes,
    rows_in_bounds,
    counts,
    HYSTERESIS: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    columns = tl.arange(0, 8)[None, :]
    low = low_0
    if HYSTERESIS:
        low = tl.where(((old >> columns) & 1) != 0, low_1, low_0)
    bits = ((u >= low) & (u < float("inf"))).to(tl.int32)
    new = tl.sum(bits << columns, 1, keep_dims=True) | persistent
    if BOUNDED:  # padding bits are 0, whatever a mask held there
        valid = tl.sum(in_bounds.to(tl.int32) << columns, 1, keep_dims=True)
        new &= valid
        old &= valid
    tl.store(mask_bytes, new.to(tl.uint8), mask=rows_in_bounds)
    changed = _popcounts(new | ((new & ~old) << 8) | ((old & ~new) << 16))
    # 10 bits a field; a chunk of 64 Ki elements leaves at most 64 blocks of 8 elements to a row
    return counts + ((changed & 0xFF) | ((changed & 0xFF00) << 2) | ((changed & 0xFF0000) << 4))


@triton.jit
def select_kernel(
    chunks,  # [programs, 4] int64
    tensors,  # [tensors, REFRESH_ROW] int64
    bounds,  # [layers, 4] fp32
    drift,  # [layers, 3] int64, added to: isolated, entered, released
    BF16: tl.constexpr,
    ALIGNED: tl.constexpr,
    HYSTERESIS: tl.constexpr,
    ROWS: tl.constexpr,
):
    chunk = chunks + tl.program_id(0) * 4
    row = tensors + tl.load(chunk) * _REFRESH_ROW
    start = tl.multiple_of(tl.load(chunk + 1), 1024)
    count = tl.load(chunk + 2).to(tl.int32)
    u_first = load_address(row + _U, BF16, ALIGNED) + start
    mask_bytes = load_mask_address(row + _ISOLATION_MASK) + (start >> 3)
    persistent_bytes = load_mask_address(row + _PERSISTENT_MASK) + (start >> 3)
    persistent_limit = mask_rows(row + _PERSISTENT_MASK, ROWS)
    layer = tl.load(row + _U_LAYER)
    low_0, low_1 = tl.load(bounds + layer * 4), tl.load(bounds + layer * 4 + 2)

    BLOCK: tl.constexpr = ROWS * 8
    rows = tl.arange(0, ROWS)[:, None]
    offsets = rows * 8 + tl.arange(0, 8)[None, :]
    counts = tl.zeros([ROWS, 1], tl.int32)
    full_blocks = count // BLOCK
    for i in range(full_blocks):
        u = widen(tl.load(u_first + i * BLOCK + offsets), BF16)
        first = i * ROWS + rows
        old = load_bits(mask_bytes + first, rows, ROWS)
        persistent = load_bits(persistent_bytes + first, rows, persistent_limit)
        counts = _select_block(
            u, old, persistent, True, low_0, low_1, mask_bytes + first, rows < ROWS, counts, HYSTERESIS, False
        )
    passed = full_blocks * BLOCK
    if passed < count:
        in_bounds = offsets < count - passed
        limit = (count - passed + 7) // 8
        u = widen(load_block(u_first + passed + offsets, in_bounds, True), BF16)
        first = full_blocks * ROWS + rows
        old = load_bits(mask_bytes + first, rows, limit)
        persistent = load_bits(persistent_bytes + first, rows, tl.minimum(persistent_limit, limit))
        counts = _select_block(
            u,
            old,
            persistent,
            in_bounds,
            low_0,
            low_1,
            mask_bytes + first,
            rows < limit,
            counts,
            HYSTERESIS,
            True,
        )
    isolated, entered, released = counts & 0x3FF, (counts >> 10) & 0x3FF, (counts >> 20) & 0x3FF
    totals = drift + layer * 3
    tl.atomic_add(totals, tl.sum(tl.sum(isolated, 1), 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(totals + 1, tl.sum(tl.sum(entered, 1), 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(totals + 2, tl.sum(tl.sum(released, 1), 0).to(tl.int64), sem="relaxed")
