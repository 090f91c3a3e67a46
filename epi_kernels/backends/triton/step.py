"""Stage 1, step: the masked AdamW update over many tensors, one launch a variant.

The order of operations is that of ``reference.step``; compiled without contraction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from epi_kernels.backends import table
from epi_kernels.backends.triton.common import (
    load_address,
    load_bits,
    load_block,
    load_mask_address,
    mask_rows,
    mix,
    round_bfloat16,
    store_block,
    widen,
)
from epi_kernels.backends.triton.stats import NO_STATS, WITH_MOMENTS, fold, publish

# A tensor's row: the columns of backends/table.py, int64, then the float32 scalars, two to a column:
# StepScalars in its order and the gradient's multiplier.
SCALARS = table.COLUMNS
ROW = SCALARS + (table.SCALAR_COLUMNS + 2) // 2
# Where the importance lives.
SHARED, OWN_FLOAT32, OWN_BFLOAT16 = 0, 1, 2

# What a kernel takes from outside must be constexpr.
_PARAM, _GRAD = tl.constexpr(table.PARAM), tl.constexpr(table.GRAD)
_EXP_AVG, _EXP_AVG_SQ = tl.constexpr(table.EXP_AVG), tl.constexpr(table.EXP_AVG_SQ)
_IMPORTANCE, _MASK = tl.constexpr(table.IMPORTANCE), tl.constexpr(table.ISOLATION_MASK)
_RNG_KEY, _INDEX_OFFSET = tl.constexpr(table.RNG_KEY), tl.constexpr(table.INDEX_OFFSET)
_LAYER, _SCALARS, _ROW = tl.constexpr(table.LAYER), tl.constexpr(SCALARS), tl.constexpr(ROW)
_SHARED, _OWN_BFLOAT16 = tl.constexpr(SHARED), tl.constexpr(OWN_BFLOAT16)
_NO_STATS, _WITH_MOMENTS = tl.constexpr(NO_STATS), tl.constexpr(WITH_MOMENTS)


@triton.jit
def _rounded(x, random_bits, BF16: tl.constexpr, STOCHASTIC: tl.constexpr):
    """float32 -> what is stored."""
    if BF16:
        return round_bfloat16(x, random_bits, STOCHASTIC)
    else:
        return x


@triton.jit
def _update(
    base,  # int64: first element of the block, counted from the tensor's
    remaining,  # elements from there to the end of the chunk; matters where BOUNDED
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    beta_u,
    one_minus_beta_u,
    eps,
    decay,
    step_size,
    multiplier,  # of the gradient
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    importance,
    mask_bytes,
    mask_limit,
    key,  # uint32: of the elements whose index has the upper half that the chunk's first one has
    next_key,  # of those behind the next multiple of 2^32
    first_index,  # uint32: lower half of the chunk's first index
    index_offset,  # int64: index of the tensor's first element in the whole tensor
    PARAM_BF16: tl.constexpr,
    STATE_BF16: tl.constexpr,
    IMPORTANCE_KIND: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    UNSCALE: tl.constexpr,
    BOUNDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Updates one block and returns its importances as stored, in float32."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, 8)[None, :]
    offsets = rows * 8 + columns
    in_bounds = offsets < remaining

    theta_raw = load_block(param + base + offsets, in_bounds, BOUNDED)
    g = widen(load_block(grad + base + offsets, in_bounds, BOUNDED), PARAM_BF16)
    m = widen(load_block(exp_avg + base + offsets, in_bounds, BOUNDED), STATE_BF16)
    v = widen(load_block(exp_avg_sq + base + offsets, in_bounds, BOUNDED), STATE_BF16)
    if BOUNDED:
        mask_limit = tl.minimum(mask_limit, (remaining + 7) // 8)
    bits = load_bits(mask_bytes + (base >> 3) + rows, rows, mask_limit)
    isolated = ((bits >> columns) & 1) != 0

    if UNSCALE:
        g = g * multiplier
        store_block(grad + base + offsets, _rounded(g, 0, PARAM_BF16, False), in_bounds, BOUNDED)
    g_squared = g * g
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * g_squared
    new = decay * widen(theta_raw, PARAM_BF16) - step_size * tl.div_rn(m, tl.sqrt_rn(v) + eps)

    w0 = 0
    w1 = 0
    if STOCHASTIC:
        low = (index_offset + base).to(tl.uint32) + offsets.to(tl.uint32)
        w0 = mix(low ^ tl.where(low < first_index, next_key, key))
        w1 = mix(w0 + 0x9E3779B9)
    v_raw = _rounded(v, w1 & 0xFFFF, STATE_BF16, STOCHASTIC)
    store_block(exp_avg + base + offsets, _rounded(m, w0 >> 16, STATE_BF16, STOCHASTIC), in_bounds, BOUNDED)
    store_block(exp_avg_sq + base + offsets, v_raw, in_bounds, BOUNDED)
    new_raw = _rounded(new, w0 & 0xFFFF, PARAM_BF16, STOCHASTIC)
    store_block(param + base + offsets, tl.where(isolated, theta_raw, new_raw), in_bounds, BOUNDED)
    if IMPORTANCE_KIND == _SHARED:
        return widen(v_raw, STATE_BF16)
    else:
        OWN_BF16: tl.constexpr = IMPORTANCE_KIND == _OWN_BFLOAT16
        u = widen(load_block(importance + base + offsets, in_bounds, BOUNDED), OWN_BF16)
        u = beta_u * u + one_minus_beta_u * g_squared
        u_raw = _rounded(u, w1 >> 16, OWN_BF16, STOCHASTIC)
        store_block(importance + base + offsets, u_raw, in_bounds, BOUNDED)
        return widen(u_raw, OWN_BF16)


@triton.jit
def step_kernel(
    chunks,  # [programs, 4] int64: chunks.py
    tensors,  # [tensors, ROW] int64
    minimum,  # [layers] fp32: LayerStats, read and written where STATS
    maximum,
    nonfinite,  # [layers] int64
    partials,  # [chunks, 2] fp64: sum of u, sum of u*u, where STATS is WITH_MOMENTS
    PARAM_BF16: tl.constexpr,
    STATE_BF16: tl.constexpr,
    IMPORTANCE_KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    UNSCALE: tl.constexpr,
    STATS: tl.constexpr,
    ROWS: tl.constexpr,
):
    chunk = chunks + tl.program_id(0) * 4
    row = tensors + tl.load(chunk) * _ROW
    start = tl.multiple_of(tl.load(chunk + 1), 1024)
    count = tl.load(chunk + 2).to(tl.int32)
    param = load_address(row + _PARAM, PARAM_BF16, ALIGNED)
    grad = load_address(row + _GRAD, PARAM_BF16, ALIGNED)
    exp_avg = load_address(row + _EXP_AVG, STATE_BF16, ALIGNED)
    exp_avg_sq = load_address(row + _EXP_AVG_SQ, STATE_BF16, ALIGNED)
    importance = exp_avg_sq
    if IMPORTANCE_KIND != _SHARED:
        importance = load_address(row + _IMPORTANCE, IMPORTANCE_KIND == _OWN_BFLOAT16, ALIGNED)
    mask_bytes = load_mask_address(row + _MASK)
    mask_limit = mask_rows(row + _MASK, ROWS)

    # loaded once: hyper-parameters never specialise a kernel
    scalars = (row + _SCALARS).to(tl.pointer_type(tl.float32), bitcast=True)
    beta1, one_minus_beta1 = tl.load(scalars), tl.load(scalars + 1)
    beta2, one_minus_beta2 = tl.load(scalars + 2), tl.load(scalars + 3)
    beta_u, one_minus_beta_u = tl.load(scalars + 4), tl.load(scalars + 5)
    eps, decay, step_size = tl.load(scalars + 6), tl.load(scalars + 7), tl.load(scalars + 8)
    multiplier = tl.load(scalars + 9)

    # A chunk crosses at most one multiple of 2^32, so two keys serve all of its elements.
    index_offset = tl.load(row + _INDEX_OFFSET)
    position = index_offset + start
    rng_key = tl.load(row + _RNG_KEY).to(tl.uint32)
    key = mix(rng_key ^ (position >> 32).to(tl.uint32))
    next_key = mix(rng_key ^ ((position >> 32) + 1).to(tl.uint32))
    first_index = position.to(tl.uint32)

    BLOCK: tl.constexpr = ROWS * 8
    lowest = tl.full([ROWS, 8], float("inf"), tl.float32)
    highest = tl.full([ROWS, 8], float("-inf"), tl.float32)
    strange = tl.zeros([ROWS, 8], tl.int32)
    # fp64 accumulators cost registers: they exist only where they are used
    WIDTH: tl.constexpr = 8 if STATS == _WITH_MOMENTS else 1
    HEIGHT: tl.constexpr = ROWS if STATS == _WITH_MOMENTS else 1
    total = tl.zeros([HEIGHT, WIDTH], tl.float64)
    squares = tl.zeros([HEIGHT, WIDTH], tl.float64)

    full_blocks = count // BLOCK
    for i in range(full_blocks):
        u = _update(
            start + i * BLOCK, BLOCK,
            beta1, one_minus_beta1, beta2, one_minus_beta2, beta_u, one_minus_beta_u,
            eps, decay, step_size, multiplier,
            param, grad, exp_avg, exp_avg_sq, importance, mask_bytes, mask_limit,
            key, next_key, first_index, index_offset,
            PARAM_BF16, STATE_BF16, IMPORTANCE_KIND, STOCHASTIC, UNSCALE, False, ROWS,
        )  # fmt: skip
        if STATS != _NO_STATS:
            lowest, highest, strange, total, squares = fold(
                u, lowest, highest, strange, total, squares, 0, False, STATS, ROWS
            )
    done = full_blocks * BLOCK
    if done < count:
        u = _update(
            start + done, count - done,
            beta1, one_minus_beta1, beta2, one_minus_beta2, beta_u, one_minus_beta_u,
            eps, decay, step_size, multiplier,
            param, grad, exp_avg, exp_avg_sq, importance, mask_bytes, mask_limit,
            key, next_key, first_index, index_offset,
            PARAM_BF16, STATE_BF16, IMPORTANCE_KIND, STOCHASTIC, UNSCALE, True, ROWS,
        )  # fmt: skip
        if STATS != _NO_STATS:
            lowest, highest, strange, total, squares = fold(
                u, lowest, highest, strange, total, squares, count - done, True, STATS, ROWS
            )
    if STATS != _NO_STATS:
        layer = tl.load(row + _LAYER)
        if layer >= 0:
            publish(
                lowest, highest, strange, total, squares,
                minimum + layer, maximum + layer, nonfinite + layer,
                partials, chunk + 3, STATS,
            )  # fmt: skip
