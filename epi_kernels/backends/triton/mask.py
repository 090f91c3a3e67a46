"""Stage 4, mask: writes whole mask bytes by one comparison an element and counts what changed."""

from __future__ import annotations

import triton
import triton.language as tl

from epi_kernels.backends.triton.codec import scale_offsets
from epi_kernels.backends.triton.common import (
    bytes_present,
    inlined,
    load_address,
    load_bits,
    load_byte_address,
)
from epi_kernels.backends.triton.nibbles import first_element, load_importances, load_scale_address
from epi_kernels.backends.triton.stats import (
    ISOLATION_MASK,
    PERSISTENT_MASK,
    REFRESH_ROW,
    U_LAYER,
    U_SCALE,
    WIDTH,
    U,
)

_U, _ISOLATION_MASK = tl.constexpr(U), tl.constexpr(ISOLATION_MASK)
_PERSISTENT_MASK, _U_LAYER = tl.constexpr(PERSISTENT_MASK), tl.constexpr(U_LAYER)
_REFRESH_ROW, _U_SCALE, _WIDTH = tl.constexpr(REFRESH_ROW), tl.constexpr(U_SCALE), tl.constexpr(WIDTH)


@inlined
def _popcounts(word):
    """Set bits of each of the three lower bytes of an int32, in place."""
    word = word - ((word >> 1) & 0x555555)
    word = (word & 0x333333) + ((word >> 2) & 0x333333)
    return (word + (word >> 4)) & 0x0F0F0F


@triton.jit
def select_kernel(
    chunks,  # [programs, 4] int64
    tensors,  # [tensors, REFRESH_ROW] int64
    bounds,  # [layers, 4] fp32
    drift,  # [layers, 3] int64, added to: isolated, entered, released
    KIND: tl.constexpr,
    FULL: tl.constexpr,
    HYSTERESIS: tl.constexpr,
    ROWS: tl.constexpr,
):
    chunk = chunks + tl.program_id(0) * 4
    row = tensors + tl.load(chunk) * _REFRESH_ROW
    start = tl.multiple_of(tl.load(chunk + 1), 64)
    count = tl.load(chunk + 2).to(tl.int32)
    u_first = first_element(load_address(row + _U, KIND, FULL), start, KIND)
    u_scale = load_scale_address(row + _U_SCALE, KIND) + (start >> 6)
    mask_bytes = load_byte_address(row + _ISOLATION_MASK) + (start >> 3)
    mask_rows = bytes_present(row + _ISOLATION_MASK, count, FULL)
    persistent_bytes = load_byte_address(row + _PERSISTENT_MASK) + (start >> 3)
    persistent_rows = bytes_present(row + _PERSISTENT_MASK, count, FULL)
    layer = tl.load(row + _U_LAYER)
    low, low_isolated = tl.load(bounds + layer * 4), tl.load(bounds + layer * 4 + 2)

    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, 8)[None, :]
    counts = tl.zeros([ROWS, 1], tl.int32)
    for begin in range(0, count, ROWS * 8):
        offsets = begin + rows * 8 + columns
        in_bounds = offsets < count
        byte = begin // 8 + rows
        scale_at = scale_offsets(begin, rows, _WIDTH)
        row_in_bounds = begin + rows * 8 < count
        u = load_importances(u_first, offsets, u_scale, scale_at, in_bounds, row_in_bounds, KIND, FULL)
        old = load_bits(mask_bytes + byte, byte, mask_rows)
        least = low
        if HYSTERESIS:
            least = tl.where(((old >> columns) & 1) != 0, low_isolated, low)
        bits = ((u >= least) & (u < float("inf"))).to(tl.int32)
        new = tl.sum(bits << columns, 1, keep_dims=True)
        new |= load_bits(persistent_bytes + byte, byte, persistent_rows)
        if not FULL:  # padding bits are 0, whatever a mask held there
            valid = tl.sum(in_bounds.to(tl.int32) << columns, 1, keep_dims=True)
            new &= valid
            old &= valid
        tl.store(mask_bytes + byte, new.to(tl.uint8), mask=byte < mask_rows)
        changed = _popcounts(new | ((new & ~old) << 8) | ((old & ~new) << 16))
        # 10 bits a field; at most 64 blocks of a chunk of 64 Ki elements leave 8 each in a row
        counts += (changed & 0xFF) | ((changed & 0xFF00) << 2) | ((changed & 0xFF0000) << 4)
    isolated, entered, released = counts & 0x3FF, (counts >> 10) & 0x3FF, (counts >> 20) & 0x3FF
    totals = drift + layer * 3
    tl.atomic_add(totals, tl.sum(tl.sum(isolated, 1), 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(totals + 1, tl.sum(tl.sum(entered, 1), 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(totals + 2, tl.sum(tl.sum(released, 1), 0).to(tl.int64), sem="relaxed")
