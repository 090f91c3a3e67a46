"""Stage 1, step: the masked AdamW update over many tensors, one launch a variant.

The order of operations is that of ``reference.step``; compiled without contraction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from epi_kernels.backends import table
from epi_kernels.backends.triton.common import (
    inlined,
    load_address,
    load_bits,
    load_block,
    load_mask_address,
    mix,
    round_bfloat16,
    rows_present,
    store_block,
    widen,
)
from epi_kernels.backends.triton.prepare import ROW, SCALARS
from epi_kernels.backends.triton.stats import NO_STATS, accumulators, fold, publish

# Where the importance lives.
SHARED, OWN_FLOAT32, OWN_BFLOAT16 = 0, 1, 2

# What a kernel takes from outside must be constexpr.
_PARAM, _GRAD = tl.constexpr(table.PARAM), tl.constexpr(table.GRAD)
_EXP_AVG, _EXP_AVG_SQ = tl.constexpr(table.EXP_AVG), tl.constexpr(table.EXP_AVG_SQ)
_IMPORTANCE, _MASK = tl.constexpr(table.IMPORTANCE), tl.constexpr(table.ISOLATION_MASK)
_RNG_KEY, _INDEX_OFFSET = tl.constexpr(table.RNG_KEY), tl.constexpr(table.INDEX_OFFSET)
_LAYER, _SCALARS, _ROW = tl.constexpr(table.LAYER), tl.constexpr(SCALARS), tl.constexpr(ROW)
_FLAGS, _SKIPPED = tl.constexpr(table.FLAGS), tl.constexpr(table.SKIPPED)
_SHARED, _OWN_BFLOAT16 = tl.constexpr(SHARED), tl.constexpr(OWN_BFLOAT16)
_NO_STATS = tl.constexpr(NO_STATS)


@inlined
def _stored(x, random_bits, BF16: tl.constexpr, STOCHASTIC: tl.constexpr):
    """float32 -> what is stored."""
    if BF16:
        return round_bfloat16(x, random_bits, STOCHASTIC)
    else:
        return x


@triton.jit
def step_kernel(
    chunks,  # [programs, 4] int64: chunks.py
    tensors,  # [tensors, ROW] int64, prepared (prepare.py)
    minimum,  # [layers] fp32: LayerStats, read and written where STATS
    maximum,
    nonfinite,  # [layers] int64
    partials,  # [chunks, 2] fp64: sum of u, sum of u*u, where STATS is WITH_MOMENTS
    PARAM_BF16: tl.constexpr,
    STATE_BF16: tl.constexpr,
    IMPORTANCE_KIND: tl.constexpr,
    FULL: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    UNSCALE: tl.constexpr,
    STATS: tl.constexpr,
    ROWS: tl.constexpr,
):
    chunk = chunks + tl.program_id(0) * 4
    row = tensors + tl.load(chunk) * _ROW
    start = tl.multiple_of(tl.load(chunk + 1), 64)
    skipped = (tl.load(row + _FLAGS) & _SKIPPED) != 0
    count = tl.where(skipped, 0, tl.load(chunk + 2)).to(tl.int32)
    OWN_BF16: tl.constexpr = IMPORTANCE_KIND == _OWN_BFLOAT16
    param = load_address(row + _PARAM, PARAM_BF16, FULL) + start
    grad = load_address(row + _GRAD, PARAM_BF16, FULL) + start
    exp_avg = load_address(row + _EXP_AVG, STATE_BF16, FULL) + start
    exp_avg_sq = load_address(row + _EXP_AVG_SQ, STATE_BF16, FULL) + start
    if IMPORTANCE_KIND != _SHARED:
        importance = load_address(row + _IMPORTANCE, OWN_BF16, FULL) + start
    mask_bytes = load_mask_address(row + _MASK) + (start >> 3)
    mask_rows = rows_present(row + _MASK, count, FULL)

    # loaded once: hyper-parameters never specialise a kernel
    scalars = (row + _SCALARS).to(tl.pointer_type(tl.float32), bitcast=True)
    beta1, one_minus_beta1 = tl.load(scalars), tl.load(scalars + 1)
    beta2, one_minus_beta2 = tl.load(scalars + 2), tl.load(scalars + 3)
    eps, decay, step_size = tl.load(scalars + 6), tl.load(scalars + 7), tl.load(scalars + 8)
    if IMPORTANCE_KIND != _SHARED:
        beta_u, one_minus_beta_u = tl.load(scalars + 4), tl.load(scalars + 5)
    if UNSCALE:
        multiplier = tl.load(scalars + 9)

    # a chunk crosses at most one multiple of 2^32, so two keys serve all of its elements
    position = tl.load(row + _INDEX_OFFSET) + start
    rng_key = tl.load(row + _RNG_KEY).to(tl.uint32)
    key = mix(rng_key ^ (position >> 32).to(tl.uint32))
    next_key = mix(rng_key ^ ((position >> 32) + 1).to(tl.uint32))
    first_index = position.to(tl.uint32)

    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, 8)[None, :]
    lowest, highest, strange, total, squares = accumulators(ROWS, STATS)
    for begin in range(0, count, ROWS * 8):
        offsets = begin + rows * 8 + columns
        in_bounds = offsets < count
        theta_raw = load_block(param + offsets, in_bounds, FULL)
        g = widen(load_block(grad + offsets, in_bounds, FULL), PARAM_BF16)
        m = widen(load_block(exp_avg + offsets, in_bounds, FULL), STATE_BF16)
        v = widen(load_block(exp_avg_sq + offsets, in_bounds, FULL), STATE_BF16)
        byte = begin // 8 + rows
        isolated = ((load_bits(mask_bytes + byte, byte, mask_rows) >> columns) & 1) != 0

        if UNSCALE:
            g = g * multiplier
            store_block(grad + offsets, _stored(g, 0, PARAM_BF16, False), in_bounds, FULL)
        g_squared = g * g
        m = beta1 * m + one_minus_beta1 * g
        v = beta2 * v + one_minus_beta2 * g_squared
        new = decay * widen(theta_raw, PARAM_BF16) - step_size * tl.div_rn(m, tl.sqrt_rn(v) + eps)

        w0 = 0
        w1 = 0
        if STOCHASTIC:
            low = first_index + offsets.to(tl.uint32)
            w0 = mix(low ^ tl.where(low < first_index, next_key, key))
            w1 = mix(w0 + 0x9E3779B9)
        store_block(exp_avg + offsets, _stored(m, w0 >> 16, STATE_BF16, STOCHASTIC), in_bounds, FULL)
        v_raw = _stored(v, w1 & 0xFFFF, STATE_BF16, STOCHASTIC)
        store_block(exp_avg_sq + offsets, v_raw, in_bounds, FULL)
        new_raw = _stored(new, w0 & 0xFFFF, PARAM_BF16, STOCHASTIC)
        store_block(param + offsets, tl.where(isolated, theta_raw, new_raw), in_bounds, FULL)
        if IMPORTANCE_KIND != _SHARED:
            u = widen(load_block(importance + offsets, in_bounds, FULL), OWN_BF16)
            u = beta_u * u + one_minus_beta_u * g_squared
            u_raw = _stored(u, w1 >> 16, OWN_BF16, STOCHASTIC)
            store_block(importance + offsets, u_raw, in_bounds, FULL)
            u_stored = widen(u_raw, OWN_BF16)
        else:
            u_stored = widen(v_raw, STATE_BF16)
        if STATS != _NO_STATS:
            lowest, highest, strange, total, squares = fold(
                u_stored, in_bounds, lowest, highest, strange, total, squares, FULL, STATS
            )
    if STATS != _NO_STATS:
        layer = tl.load(row + _LAYER)
        if layer >= 0:
            publish(
                lowest, highest, strange, total, squares, minimum + layer, maximum + layer, nonfinite + layer,
                partials, chunk + 3, STATS,
            )  # fmt: skip
