"""Weights of 24 or 32 bits as bfloat16 and a correction: ``reference.master``, on words."""

from __future__ import annotations

import triton.language as tl

from epi_kernels.backends.triton.common import BFLOAT16, INT8, inlined

# How a correction is stored: not at all, as two bytes, or as one.
NO_CORRECTION, TWO_BYTES, ONE_BYTE = 0, BFLOAT16, INT8

_ONE_BYTE = tl.constexpr(ONE_BYTE)


@inlined
def joined_weight(weight_raw, correction_raw, CORRECTION: tl.constexpr):
    """bf16 bits and a correction's, both unsigned -> float32."""
    high = weight_raw.to(tl.uint32) << 16
    if CORRECTION == _ONE_BYTE:
        low = correction_raw.to(tl.int8, bitcast=True).to(tl.int32) << 8
    else:
        low = correction_raw.to(tl.int16, bitcast=True).to(tl.int32)
    joined = (high + low.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    # a correction that makes a NaN is another weight's
    return tl.where(joined != joined, high.to(tl.float32, bitcast=True), joined)


@inlined
def split_weight(x, random_bits, CORRECTION: tl.constexpr, STOCHASTIC: tl.constexpr):
    """float32 -> (bf16 bits, the correction's). ``random_bits``: 16 an element."""
    word = x.to(tl.uint32, bitcast=True)
    if CORRECTION == _ONE_BYTE:
        if STOCHASTIC:
            word = word + (random_bits >> 8)
        else:
            word = word + (0x7F + ((word >> 8) & 1))
        word = word & 0xFFFFFF00
    word = tl.where(x != x, 0x7FC00000, word)
    weight = ((word + 0x8000) >> 16).to(tl.uint16)
    if CORRECTION == _ONE_BYTE:
        return weight, (word >> 8).to(tl.uint8)
    else:
        return weight, word.to(tl.uint16)
