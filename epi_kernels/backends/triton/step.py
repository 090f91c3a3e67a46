"""Stage 1, step: the masked AdamW update over many tensors, one launch a variant.

The order of operations is that of ``reference.step``; compiled without contraction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from epi_kernels.backends import table
from epi_kernels.backends.triton.codec import BLOCK, decode, encode, load_values, scale_offsets
from epi_kernels.backends.triton.common import (
    BFLOAT16,
    INT4,
    INT8,
    bytes_present,
    inlined,
    load_address,
    load_block,
    load_byte_address,
    load_row_bits,
    mix,
    round_bfloat16,
    store_block,
    widen,
)
from epi_kernels.backends.triton.master import NO_CORRECTION, joined_weight, split_weight
from epi_kernels.backends.triton.nibbles import (
    decode_average,
    decode_square,
    encode_average,
    encode_square,
    first_element,
    load_codes,
    load_scale_address,
    load_scale_words,
    moment_bound,
    store_codes,
)
from epi_kernels.backends.triton.prepare import KEY, ROW, SCALARS
from epi_kernels.backends.triton.stats import NO_STATS, accumulators, fold, publish

# Where the importance lives: in exp_avg_sq, or in a tensor of its own of the kind IMPORTANCE - OWN.
SHARED, OWN = 0, 1

# What a kernel takes from outside must be constexpr.
_PARAM, _GRAD = tl.constexpr(table.PARAM), tl.constexpr(table.GRAD)
_EXP_AVG, _EXP_AVG_SQ = tl.constexpr(table.EXP_AVG), tl.constexpr(table.EXP_AVG_SQ)
_IMPORTANCE, _MASK = tl.constexpr(table.IMPORTANCE), tl.constexpr(table.ISOLATION_MASK)
_KEY, _INDEX_OFFSET = tl.constexpr(KEY), tl.constexpr(table.INDEX_OFFSET)
_INDEX_RUN, _INDEX_STRIDE = tl.constexpr(table.INDEX_RUN), tl.constexpr(table.INDEX_STRIDE)
_LAYER, _SCALARS, _ROW = tl.constexpr(table.LAYER), tl.constexpr(SCALARS), tl.constexpr(ROW)
_FLAGS, _SKIPPED = tl.constexpr(table.FLAGS), tl.constexpr(table.SKIPPED)
_EXP_AVG_SCALE, _EXP_AVG_SQ_SCALE = tl.constexpr(table.EXP_AVG_SCALE), tl.constexpr(table.EXP_AVG_SQ_SCALE)
_IMPORTANCE_SCALE = tl.constexpr(table.IMPORTANCE_SCALE)
_CORRECTION, _NO_CORRECTION = tl.constexpr(table.WEIGHT_CORRECTION), tl.constexpr(NO_CORRECTION)
_SHARED, _OWN = tl.constexpr(SHARED), tl.constexpr(OWN)
_BFLOAT16, _INT8, _INT4 = tl.constexpr(BFLOAT16), tl.constexpr(INT8), tl.constexpr(INT4)
_NO_STATS, _BLOCK = tl.constexpr(NO_STATS), tl.constexpr(BLOCK)


@inlined
def _stored(x, random_bits, KIND: tl.constexpr, STOCHASTIC: tl.constexpr):
    """float32 -> what is stored, no codes."""
    if KIND == _BFLOAT16:
        return round_bfloat16(x, random_bits, STOCHASTIC)
    else:
        return x


@inlined
def _store_values(
    pointers,
    scales,  # [ROWS, 1]; read and written for codes alone
    x,
    random_bits,
    in_bounds,
    scale_in_bounds,
    KIND: tl.constexpr,
    SIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Stores float32 [ROWS, WIDTH]; returns it as stored."""
    if KIND == _INT8:
        codes, scale = encode(x, random_bits, in_bounds, SIGNED, STOCHASTIC, FULL, ROWS, WIDTH)
        store_block(pointers, codes, in_bounds, FULL)
        tl.store(scales, scale.to(tl.uint8), mask=scale_in_bounds)
        return decode(codes, scale, SIGNED)
    else:
        raw = _stored(x, random_bits, KIND, STOCHASTIC)
        store_block(pointers, raw, in_bounds, FULL)
        return widen(raw, KIND)


@triton.jit
def step_kernel(
    chunks,  # [programs, 4] int64: chunks.py
    tensors,  # [tensors, ROW] int64, prepared (prepare.py)
    minimum,  # [layers] fp32: LayerStats, read and written where STATS
    maximum,
    nonfinite,  # [layers] int64
    partials,  # [chunks, 2] fp64: sum of u, sum of u*u, where STATS is WITH_MOMENTS
    PARAM: tl.constexpr,  # kinds of common.py
    STATE: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    CORRECTION: tl.constexpr,  # of master.py
    FULL: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SCATTERED: tl.constexpr,
    UNSCALE: tl.constexpr,
    STATS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # elements of a row
):
    chunk = chunks + tl.program_id(0) * 4
    row = tensors + tl.load(chunk) * _ROW
    start = tl.multiple_of(tl.load(chunk + 1), 64)
    skipped = (tl.load(row + _FLAGS) & _SKIPPED) != 0
    count = tl.where(skipped, 0, tl.load(chunk + 2)).to(tl.int32)
    U: tl.constexpr = IMPORTANCE - _OWN
    param = load_address(row + _PARAM, PARAM, FULL) + start
    grad = load_address(row + _GRAD, PARAM, FULL) + start
    if CORRECTION != _NO_CORRECTION:
        correction = load_address(row + _CORRECTION, CORRECTION, FULL) + start
    exp_avg = first_element(load_address(row + _EXP_AVG, STATE, FULL), start, STATE)
    exp_avg_sq = first_element(load_address(row + _EXP_AVG_SQ, STATE, FULL), start, STATE)
    exp_avg_scale = load_scale_address(row + _EXP_AVG_SCALE, STATE) + (start >> 6)
    exp_avg_sq_scale = load_scale_address(row + _EXP_AVG_SQ_SCALE, STATE) + (start >> 6)
    if IMPORTANCE != _SHARED:
        importance = load_address(row + _IMPORTANCE, U, FULL) + start
        importance_scale = load_byte_address(row + _IMPORTANCE_SCALE) + (start >> 6)
    mask_bytes = load_byte_address(row + _MASK) + (start >> 3)
    n_mask_bytes = bytes_present(row + _MASK, count, FULL)

    # loaded once: hyper-parameters never specialise a kernel
    scalars = (row + _SCALARS).to(tl.pointer_type(tl.float32), bitcast=True)
    beta1, one_minus_beta1 = tl.load(scalars), tl.load(scalars + 1)
    beta2, one_minus_beta2 = tl.load(scalars + 2), tl.load(scalars + 3)
    eps, decay, step_size = tl.load(scalars + 6), tl.load(scalars + 7), tl.load(scalars + 8)
    if IMPORTANCE != _SHARED:
        beta_u, one_minus_beta_u = tl.load(scalars + 4), tl.load(scalars + 5)
    if UNSCALE:
        multiplier = tl.load(scalars + 9)
    if STATE == _INT4:
        bound = moment_bound(beta1, one_minus_beta1, beta2, one_minus_beta2)
        byte_columns = tl.arange(0, WIDTH // 2)[None, :]

    # a chunk crosses at most one multiple of 2^32, so two keys serve all of its elements
    index_offset = tl.load(row + _INDEX_OFFSET)
    position = index_offset + start
    if SCATTERED:
        run, stride = tl.load(row + _INDEX_RUN), tl.load(row + _INDEX_STRIDE)
    rng_key = tl.load(row + _KEY).to(tl.uint32)
    key = mix(rng_key ^ (position >> 32).to(tl.uint32))
    next_key = mix(rng_key ^ ((position >> 32) + 1).to(tl.uint32))
    first_index = position.to(tl.uint32)

    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    lowest, highest, strange, total, squares = accumulators(ROWS, STATS)
    for begin in range(0, count, ROWS * WIDTH):
        offsets = begin + rows * WIDTH + columns
        in_bounds = offsets < count
        row_in_bounds = begin + rows * WIDTH < count
        block = scale_offsets(begin, rows, WIDTH)
        theta_raw = load_block(param + offsets, in_bounds, FULL)
        if CORRECTION != _NO_CORRECTION:
            correction_raw = load_block(correction + offsets, in_bounds, FULL)
        g = widen(load_block(grad + offsets, in_bounds, FULL), PARAM)
        if STATE == _INT4:
            bytes_ = begin // 2 + rows * (WIDTH // 2) + byte_columns
            byte_in_bounds = 2 * bytes_ < count
            square_scale = load_scale_words(exp_avg_sq_scale + block, row_in_bounds, FULL)
            square_code = load_codes(exp_avg_sq + bytes_, byte_in_bounds, FULL)
            v = decode_square(square_code, square_scale)
            code = load_codes(exp_avg + bytes_, byte_in_bounds, FULL)
            m = decode_average(
                code, load_scale_words(exp_avg_scale + block, row_in_bounds, FULL), square_code
            )
        else:
            m = load_values(
                exp_avg + offsets, exp_avg_scale + block, in_bounds, row_in_bounds, STATE, True, FULL
            )
            v = load_values(
                exp_avg_sq + offsets, exp_avg_sq_scale + block, in_bounds, row_in_bounds, STATE, False, FULL
            )

        if UNSCALE:
            g = g * multiplier
            store_block(grad + offsets, _stored(g, 0, PARAM, False), in_bounds, FULL)
        g_squared = g * g
        m = beta1 * m + one_minus_beta1 * g
        v = beta2 * v + one_minus_beta2 * g_squared
        if CORRECTION == _NO_CORRECTION:
            theta = widen(theta_raw, PARAM)
        else:
            theta = joined_weight(theta_raw, correction_raw, CORRECTION)
        new = decay * theta - step_size * tl.div_rn(m, tl.sqrt_rn(v) + eps)

        w0 = 0
        w1 = 0
        if STOCHASTIC and SCATTERED:
            at = start + offsets
            index = index_offset + at // run * stride + at % run
            w0 = mix(index.to(tl.uint32) ^ mix(rng_key ^ (index >> 32).to(tl.uint32)))
            w1 = mix(w0 + 0x9E3779B9)
        elif STOCHASTIC:
            low = first_index + offsets.to(tl.uint32)
            w0 = mix(low ^ tl.where(low < first_index, next_key, key))
            w1 = mix(w0 + 0x9E3779B9)
        if CORRECTION == _NO_CORRECTION:
            new_raw = _stored(new, w0 & 0xFFFF, PARAM, STOCHASTIC)
        else:
            new_raw, left = split_weight(new, w0 & 0xFFFF, CORRECTION, STOCHASTIC)
        # behind the arithmetic, where it costs no register, but not behind a store, which no load may pass
        bits = load_row_bits(mask_bytes, begin // 8 + rows * (WIDTH // 8), n_mask_bytes, WIDTH)
        # one row of a block of 64 stores its scale
        stores_scale = row_in_bounds & (rows % (_BLOCK // WIDTH) == 0)
        if STATE == _INT4:
            square_code, square_scale = encode_square(
                v, square_scale, w1 & 0x7FFFFF, in_bounds, STOCHASTIC, FULL, ROWS, WIDTH
            )
            store_codes(exp_avg_sq + bytes_, square_code, in_bounds, byte_in_bounds, FULL, ROWS, WIDTH)
            tl.store(exp_avg_sq_scale + block, (square_scale >> 16).to(tl.uint16), mask=stores_scale)
            code, scale = encode_average(
                m, square_code, square_scale, bound, w0 >> 16, in_bounds, STOCHASTIC, FULL, ROWS, WIDTH
            )
            store_codes(exp_avg + bytes_, code, in_bounds, byte_in_bounds, FULL, ROWS, WIDTH)
            tl.store(exp_avg_scale + block, (scale >> 16).to(tl.uint16), mask=stores_scale)
            u_stored = decode_square(square_code, square_scale)
        else:
            _store_values(
                exp_avg + offsets, exp_avg_scale + block, m, w0 >> 16, in_bounds, stores_scale,
                STATE, True, STOCHASTIC, FULL, ROWS, WIDTH,
            )  # fmt: skip
            u_stored = _store_values(
                exp_avg_sq + offsets, exp_avg_sq_scale + block, v, w1 & 0xFFFF, in_bounds, stores_scale,
                STATE, False, STOCHASTIC, FULL, ROWS, WIDTH,
            )  # fmt: skip
        isolated = ((bits >> columns) & 1) != 0
        store_block(param + offsets, tl.where(isolated, theta_raw, new_raw), in_bounds, FULL)
        if CORRECTION != _NO_CORRECTION:
            store_block(correction + offsets, tl.where(isolated, correction_raw, left), in_bounds, FULL)
        if IMPORTANCE != _SHARED:
            u = load_values(
                importance + offsets, importance_scale + block, in_bounds, row_in_bounds, U, False, FULL
            )
            u = beta_u * u + one_minus_beta_u * g_squared
            u_stored = _store_values(
                importance + offsets, importance_scale + block, u, w1 >> 16, in_bounds, stores_scale,
                U, False, STOCHASTIC, FULL, ROWS, WIDTH,
            )  # fmt: skip
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
