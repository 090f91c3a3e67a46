"""8-bit states in registers: ``reference/codec.py`` to the bit, by the cheapest road that a GPU has.

A block of elements is [ROWS, WIDTH]; the 64 consecutive elements that share a scale are 64 / WIDTH rows.
Chunks start at multiples of 64, so that no such run belongs to two blocks.
"""

from __future__ import annotations

import triton.language as tl

from epi_kernels.backends.triton.common import INT8, inlined, load_block, widen
from epi_kernels.reference import codec

BLOCK = codec.BLOCK
_INT8, _BLOCK = tl.constexpr(INT8), tl.constexpr(BLOCK)
_NONFINITE = tl.constexpr(codec.NONFINITE)


@inlined
def scale_offsets(begin, rows, WIDTH: tl.constexpr):
    """[ROWS, 1]: where the scale of a row lies; ``begin``: the first row's element, a multiple of 64."""
    return begin // _BLOCK + rows // (_BLOCK // WIDTH)


@inlined
def load_values(
    pointers, scales, in_bounds, row_in_bounds, KIND: tl.constexpr, SIGNED: tl.constexpr, FULL: tl.constexpr
):
    """What is stored there -> float32 [ROWS, WIDTH]; ``scales`` [ROWS, 1] are read for codes alone."""
    raw = load_block(pointers, in_bounds, FULL)
    if KIND == _INT8:
        return decode(raw, load_block(scales, row_in_bounds, FULL).to(tl.int32), SIGNED)
    else:
        return widen(raw, KIND)


@inlined
def power_of_two(biased_exponent):
    return (biased_exponent << 23).to(tl.float32, bitcast=True)


@inlined
def decode(codes, scale, SIGNED: tl.constexpr):
    """Codes [ROWS, WIDTH] uint8, scales [ROWS, 1] int32 -> float32, exactly.

    A code with a sign is the upper part of a float16. A block that is not finite becomes so by its factor.
    """
    if SIGNED:
        # sign-extended: the sign is where float16 has it, its copies are cut
        half = (codes.to(tl.int8, bitcast=True).to(tl.int16) << 6) & -0x6040
        factor = tl.where(scale == _NONFINITE, float("nan"), power_of_two(scale + 32))
        return half.to(tl.float16, bitcast=True).to(tl.float32) * factor
    else:
        # as float32's word a code is a small number; no one factor would cover all exponents
        word = codes.to(tl.int32) << 19
        word += 7 * tl.minimum(word, 16 << 19)  # evenly spaced: below 16 there are two codes to a binade
        factor = tl.where(scale == _NONFINITE, float("inf"), power_of_two(scale + 17))
        return word.to(tl.float32, bitcast=True) * 5.192296858534828e33 * factor  # 2^112


@inlined
def block_maximum(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] uint32 -> [ROWS, 1]: the largest of the 64 that a row belongs to."""
    PER_BLOCK: tl.constexpr = _BLOCK // WIDTH
    BLOCKS: tl.constexpr = ROWS // PER_BLOCK
    top = tl.max(tl.reshape(tl.max(x, 1), [BLOCKS, PER_BLOCK]), 1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(top, [BLOCKS, PER_BLOCK]), [ROWS, 1])


@inlined
def encode(
    x,
    random_bits,  # in [0, 2^16)
    in_bounds,
    SIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """float32 [ROWS, WIDTH] -> codes uint8, scales int32 [ROWS, 1]."""
    LIMIT: tl.constexpr = 247 if SIGNED else 255
    word = x.to(tl.uint32, bitcast=True)
    magnitude = word  # of a NaN that arithmetic made the sign may be set; as unsigned it is the largest too
    if SIGNED:
        magnitude = word & 0x7FFFFFFF
    if not FULL:
        magnitude = tl.where(in_bounds, magnitude, 0)
    top = block_maximum(magnitude, ROWS, WIDTH)
    nonfinite = top >= (LIMIT << 23) - 0x7FFFF
    biased = tl.where(nonfinite, 256, ((top + 0x7FFFF) >> 23).to(tl.int32))
    biased = tl.maximum(biased, 24)
    rounding = 1 << 18
    if STOCHASTIC:
        rounding = (random_bits << 3).to(tl.int32)
    if SIGNED:
        # the smallest normal code is to be float32's smallest normal number: then the word is code << 19,
        # subnormals laid on their grid by the multiplication. One factor would not cover all exponents.
        scaled = x * power_of_two(260 - biased) * 1.1754943508222875e-38  # 2^-126
        scaled = scaled.to(tl.int32, bitcast=True) + rounding
        code = (((scaled << 5) & 0x7FFFFFFF) | (scaled & -0x80000000)).to(tl.uint32) >> 24
        code = tl.where(nonfinite, 0, code)
    else:
        # of the two spacings, the one whose code is larger holds
        fine = word.to(tl.int32) - ((biased - 15) << 23)
        code = tl.maximum(fine, (fine >> 3) + (7 << 20)) + rounding
        # no less than code 4; in a block that is not finite no code exceeds 255, the least
        code = tl.maximum(code, tl.where(nonfinite, 255 << 19, 4 << 19)) >> 19
        code = tl.where(word == 0, tl.where(nonfinite, 255, 0), code)
    return code.to(tl.uint8), tl.where(nonfinite, _NONFINITE, biased - 24)
