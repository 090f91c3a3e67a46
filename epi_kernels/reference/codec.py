"""8-bit states: a byte an element, a power-of-two scale a block of 64 consecutive logical elements.

exp_avg: sign, 3 exponent and 4 mantissa bits, with subnormals. exp_avg_sq and importance: 15 binades of 16
codes and, below them, 6 of two: 1 .. 3 are never written, what is positive becomes no less than 4. A scale byte
holds the biased exponent b of the block's largest magnitude, less 24; with E = b - 127

    exp_avg    = half(sign << 15 | code << 6)          * 2^(E + 8)      half: IEEE binary16
    exp_avg_sq = half((code + 7 * min(code, 16)) << 6) * 2^(E - 7)

Second moments reach 2^-20 of 2^E, first moments 2^-10 of theirs, the root: a smaller element neither stalls at
a second moment far above its own nor takes, rounded up, a step far beyond its own.

All zero bytes are a block of zeros. A block that holds a value that is not finite, or beyond the code, has
the scale 255: its exp_avg decodes to NaN, its exp_avg_sq to +inf, whole.

Grids of neighbouring scales are nested, so a moving block maximum re-rounds nothing, and codes are linear
in the value between two powers of two, so stochastic rounding is unbiased in the value.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # elements that share a scale
MIN_ELEMENTS = 4096  # smaller tensors keep float32 states
NONFINITE = 255  # the scale of a block that is not finite

_LOWEST = 24  # smallest biased exponent of a block
_LIMIT_SIGNED, _LIMIT_UNSIGNED = 247, 255  # biased exponents from which a block is not finite
# a maximum in the last 1/16 of its binade takes the next one, so that rounding up never overflows a code
_ROUND_UP = 0x7FFFF
_FINE = 16  # the least unsigned code of the binades of 16
_LEAST = 4  # the least unsigned code of a positive value
_HALF = 0x8000  # "random bits" that round to nearest


def scale_bytes(n_elements: int) -> int:
    return -(-n_elements // BLOCK)


def encode(x: Tensor, random_bits: Tensor | None, *, signed: bool) -> tuple[Tensor, Tensor]:
    """[n] fp32 -> codes uint8 [n], scales uint8 [ceil(n / 64)]. ``random_bits``: [n] in [0, 2^16), None: to nearest.

    floor(x + r16 / 65536) on the code's scale. ``x`` starts at a multiple of 64 in its tensor; without ``signed``
    it is not negative.
    """
    n = x.numel()
    word = blocks(x.contiguous().view(torch.int32))
    random = _HALF if random_bits is None else blocks(random_bits.to(torch.int32))
    magnitude = word & 0x7FFFFFFF
    top = magnitude.amax(1, keepdim=True)  # as integers: NaN > inf > finite
    limit = _LIMIT_SIGNED if signed else _LIMIT_UNSIGNED
    nonfinite = top >= (limit << 23) - _ROUND_UP
    exponent = ((top.masked_fill(nonfinite, 0) + _ROUND_UP) >> 23).clamp_min(_LOWEST)
    magnitude = torch.where(nonfinite, 0, magnitude)
    if signed:
        # the smallest normal becomes 2.0; below it, adding 2.0 lays the subnormals on their grid
        y = magnitude.view(torch.float32) * power_of_two(261 - exponent)
        scaled = torch.maximum(y.view(torch.int32), (y + 2.0).view(torch.int32) - (1 << 23))
        code = ((scaled + (random << 3)) >> 19) - 2032
        code = torch.where(nonfinite, 0, code | ((word >> 24) & 0x80))
    else:
        fine = (magnitude + (random << 3) - ((exponent - 15) << 23)) >> 19
        coarse = (magnitude + (random << 6) - ((exponent - 22) << 23)) >> 22
        code = torch.where(magnitude > 0, torch.maximum(fine, coarse).clamp_min(_LEAST), 0)
        code = torch.where(nonfinite, 255, code)
    scale = torch.where(nonfinite, NONFINITE, exponent - _LOWEST)
    return code.to(torch.uint8).view(-1)[:n], scale.to(torch.uint8).view(-1)


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Inverse of ``encode``: [n] fp32, exact."""
    return decode_each(blocks(codes), scales.view(-1, 1), signed=signed).view(-1)[: codes.numel()]


def decode_each(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """fp32 of codes' shape: codes whose scales are given element by element, or broadcast."""
    code, scale = codes.to(torch.int32), scales.to(torch.int32)
    nonfinite = scale == NONFINITE
    exponent = scale.masked_fill(nonfinite, 0) + _LOWEST
    bits = ((code & 0x7F) if signed else code + 7 * code.clamp_max(_FINE)) << 19
    x = torch.minimum((bits + 0x3F800000).view(torch.float32), (bits + 0x40000000).view(torch.float32) - 2.0)
    x = x * power_of_two(exponent - (7 if signed else 22))
    if signed:
        x = (x.view(torch.int32) | ((code & 0x80) << 24)).view(torch.float32)
    return x.masked_fill(nonfinite, torch.nan if signed else torch.inf)


def blocks(x: Tensor) -> Tensor:
    """[n] -> [blocks, 64], the last block filled up with zeros."""
    return torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def power_of_two(biased_exponent: Tensor) -> Tensor:
    return (biased_exponent << 23).view(torch.float32)
