"""4-bit states: two codes a byte, two-byte scales a block of 64 consecutive logical elements.

Packed low nibble first, in logical row-major order, the last nibble of an odd number 0. A scale is the upper half
of a float32's word, a bfloat16. With S and M the scales of a block, and c the code of an element's exp_avg_sq,

    exp_avg_sq = S * LEVELS[c]
    exp_avg    = sign * M * MAGNITUDES[code & 7] * ROOTS[c]      sign: bit 3; ROOTS[c]: of LEVELS[c], of 0 as of 1

so that an exp_avg is coded in units of the root of its own second moment: rounding moves an update by a share of the
block's largest update, however small the element's gradients are beside its neighbours'. Stochastic rounding goes to
the level below or above, with the probabilities that keep the mean; a second moment takes 23 random bits to it, for
with 16 an EMA of beta 0.999 would lose 2 % on its way through five time constants.

What 16 levels cost, and why these. Jumps of a factor r leave an EMA of squares a noise of about
sqrt((r - 1/r) / 4) of itself, so levels lie close where masks are decided, at the block's top (1.5, 1, 0.75, 0.5),
a factor 2 apart below, and 4 apart at the bottom, which reaches 2^-16: with a factor 2 all the way (2^-14) an
element that has stopped beside neighbours of 3 times its gradient is 2 to 5 % above its true value after 5,000 steps,
with a factor of 4 all the way the largest update is 4 times float32's.

A scale S keeps its mantissa for good, that of the block's first maximum, and only its exponent follows the maximum:
grids stay nested as far as their levels go, and equal codes of two blocks are not equal values, so that few elements
tie at a mask's threshold. ``bound``: no gradients make \\|exp_avg\\| larger than ``bound * sqrt(exp_avg_sq)``
(Cauchy-Schwarz, ``moment_bound``); beyond that exp_avg is cut, for its second moment was rounded down.

All zero bytes are a block of zeros. A block with a value that is not finite, or of 2^123 and more, has the scale
NaN or, of exp_avg_sq, +inf, and is so whole. A positive exp_avg_sq never becomes 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epi_kernels.reference.codec import blocks, power_of_two
from epi_kernels.reference.rounding import exact_sqrt
from epi_kernels.reference.scalars import StepScalars

LEVELS = (0.0, *(2.0**-k for k in (16, 14, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1)), 0.75, 1.0, 1.5)
ROOTS = tuple(torch.tensor(level or 2.0**-16, dtype=torch.float64).sqrt().float().item() for level in LEVELS)
MAGNITUDES = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
SCALE_DTYPE = torch.bfloat16

_LIMIT = 250 << 23  # words from which a block is not finite
_LOWEST = 24  # smallest biased exponent of a scale
_MANTISSA, _UPPER = 0x7F0000, -0x10000
_INFINITY, _NAN = 0x7F80, 0x7FC0  # scales
_THIRD, _TWO_THIRDS, _TWELFTH = (torch.tensor(x, dtype=torch.float32).item() for x in (1 / 3, 2 / 3, 1 / 12))


def packed_bytes(n_elements: int) -> int:
    return (n_elements + 1) // 2


def pack(codes: Tensor) -> Tensor:
    """[n] uint8 below 16 -> uint8 [ceil(n / 2)]."""
    pairs = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4


def unpack(packed: Tensor, n_elements: int) -> Tensor:
    """Inverse of ``pack``: [n] uint8."""
    return torch.stack([packed & 15, packed >> 4], 1).view(-1)[:n_elements]


def moment_bound(scalars: StepScalars) -> float:
    """fp32: the largest \\|exp_avg\\| / sqrt(exp_avg_sq) of these betas; inf where there is none."""
    beta1, one_minus_beta1, beta2, one_minus_beta2 = torch.tensor(scalars[:4], dtype=torch.float32)
    ratio = beta1 * beta1 / beta2
    if not ratio < 1:
        return torch.inf
    root = exact_sqrt(one_minus_beta2 * (1 - ratio))
    return (one_minus_beta1 / root).item()


def encode_exp_avg_sq(x: Tensor, scales: Tensor | None, random_bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """[n] fp32, not negative -> codes uint8 [n] below 16, scales bf16 [ceil(n / 64)].

    ``scales``: the blocks' scales up to now, None: no block has one. ``random_bits``: [n] in [0, 2^23), None: to
    nearest. ``x`` starts at a multiple of 64 in its tensor.
    """
    x_blocks, random = blocks(x.contiguous()), _random(random_bits, 23)
    top = _top(x_blocks)
    nonfinite = top >= _LIMIT
    finite_top = torch.where(nonfinite, 0, top)
    old = torch.zeros_like(top) if scales is None else _words(scales)
    has_old = (old > 0) & (old < _INFINITY << 16)
    mantissa = torch.where(has_old, old, finite_top) & _MANTISSA
    inverse = 1.0 / (mantissa | 0x3F800000).view(torch.float32)
    # the smallest exponent with 1.5 S >= the largest value
    exponent = ((finite_top.view(torch.float32) * inverse).view(torch.int32) + 0x3FFFFF) >> 23
    exponent = exponent.clamp_min(_LOWEST)
    y = torch.where(nonfinite, 0.0, x_blocks) * (inverse * power_of_two(271 - exponent))  # S becomes 2^17
    word = y.view(torch.int32)
    middle = word - (131 << 23)  # a level a binade, and from the second highest on two
    middle = torch.where(middle > 12 << 23, 2 * middle - (12 << 23), middle)
    middle = (middle + random) >> 23
    # a level every second binade: what lies between two, as a share of the way, in one binade
    below = (word & 0x7F000000).view(torch.float32)
    coarse = (y * _THIRD + below * _TWO_THIRDS).view(torch.int32)
    coarse = ((coarse + random + (1 << 23)) >> 24) - 63
    code = torch.where(word < 136 << 23, coarse, middle).clamp_min(1)
    code = torch.where(nonfinite, 15, torch.where(x_blocks > 0, code, 0))
    scale = torch.where(top == 0, 0, exponent << 23 | mantissa) >> 16
    scale = torch.where(nonfinite, _INFINITY, scale)
    return _flat(code, x), _as_scales(scale)


def encode_exp_avg(
    x: Tensor, random_bits: Tensor | None, exp_avg_sq: tuple[Tensor, Tensor], bound: float = torch.inf
) -> tuple[Tensor, Tensor]:
    """[n] fp32 -> codes uint8 [n] below 16, scales bf16 [ceil(n / 64)], beside the codes and scales of ``exp_avg_sq``.

    ``random_bits``: [n] in [0, 2^16), None: to nearest.
    """
    x_blocks, random = blocks(x.contiguous()), _random(random_bits, 16)
    y = x_blocks.abs() * (1.0 / _roots(blocks(exp_avg_sq[0])))
    top = _top(y)
    nonfinite = top >= _LIMIT
    largest = torch.where(nonfinite, 0, top).view(torch.float32)
    cut = bound * exact_sqrt(_words(exp_avg_sq[1]).view(torch.float32))
    largest = torch.where(cut < largest, cut, largest)
    scale = (((largest * _TWELFTH).view(torch.int32) + 0xFFFF) & _UPPER).view(torch.float32)
    scale = scale.clamp_min(2.0 ** (_LOWEST - 127))
    y = torch.where(nonfinite, 0.0, y) * (1.0 / scale)
    y = torch.where(y < MAGNITUDES[-1], y, MAGNITUDES[-1])
    # the smallest normal is 2.0; below it, adding 2.0 lays the subnormals on their grid
    word = torch.maximum(y.view(torch.int32), (y + 2.0).view(torch.int32) - (1 << 23))
    code = ((word + (random << 6)) >> 22) - 254
    code = torch.where(nonfinite, 0, code | (x_blocks.view(torch.int32) >> 28 & 8))
    word = torch.where(top == 0, 0, scale.view(torch.int32)) >> 16
    return _flat(code, x), _as_scales(torch.where(nonfinite, _NAN, word))


def decode_exp_avg_sq(codes: Tensor, scales: Tensor) -> Tensor:
    """[n] fp32, exact. ``scales``: one a block."""
    return decode_exp_avg_sq_each(blocks(codes), scales.view(-1, 1)).view(-1)[: codes.numel()]


def decode_exp_avg(codes: Tensor, scales: Tensor, exp_avg_sq_codes: Tensor) -> Tensor:
    """[n] fp32, rounded once. ``scales``: one a block."""
    found = decode_exp_avg_each(blocks(codes), scales.view(-1, 1), blocks(exp_avg_sq_codes))
    return found.view(-1)[: codes.numel()]


def decode_exp_avg_sq_each(codes: Tensor, scales: Tensor) -> Tensor:
    """fp32 of codes' shape: codes whose scales are given element by element, or broadcast."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=codes.device)
    return levels[codes.long()] * scales.float()


def decode_exp_avg_each(codes: Tensor, scales: Tensor, exp_avg_sq_codes: Tensor) -> Tensor:
    """fp32 of codes' shape, likewise."""
    magnitudes = torch.tensor(MAGNITUDES, dtype=torch.float32, device=codes.device)
    magnitudes = torch.cat([magnitudes, -magnitudes])
    return magnitudes[codes.long()] * scales.float() * _roots(exp_avg_sq_codes)


def _roots(exp_avg_sq_codes: Tensor) -> Tensor:
    roots = torch.tensor(ROOTS, dtype=torch.float32, device=exp_avg_sq_codes.device)
    return roots[exp_avg_sq_codes.long()]


def _random(random_bits: Tensor | None, width: int) -> Tensor | int:
    """Random bits by block; without any, what rounds to nearest."""
    return 1 << (width - 1) if random_bits is None else blocks(random_bits.to(torch.int32))


def _top(x: Tensor) -> Tensor:
    """[blocks, 1]: the largest magnitude's word; as integers NaN > inf > finite."""
    return (x.view(torch.int32) & 0x7FFFFFFF).amax(1, keepdim=True)


def _words(scales: Tensor) -> Tensor:
    """[blocks, 1] int32: words of the float32 that scales are."""
    return scales.view(torch.int16).to(torch.int32).view(-1, 1) << 16


def _as_scales(upper_halves: Tensor) -> Tensor:
    return upper_halves.to(torch.int16).view(-1).view(SCALE_DTYPE)


def _flat(code: Tensor, x: Tensor) -> Tensor:
    return code.to(torch.uint8).view(-1)[: x.numel()]
