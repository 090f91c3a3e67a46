"""Weights of 24 or 32 bits, kept as bfloat16 and a signed correction beside it.

The float32 word of a weight is ``(bf16 << 16) + correction``, where the bfloat16 is the one nearest to it, a
tie going up in magnitude. The model computes with the bfloat16 as ever; the step with both. A correction of 16
bits keeps every bit of a float32, one of 8 bits the upper 24, rounded as bfloat16 is: up by random bits, or to
nearest even.
"""

from __future__ import annotations

import torch
from torch import Tensor

CORRECTION_DTYPES = {24: torch.int8, 32: torch.int16}

_WORD = 0xFFFFFFFF
_NAN = 0x7FC00000  # one stands for all


def dropped_bits(correction: torch.dtype) -> int:
    """How many of a float32's lowest bits a correction of this dtype does without."""
    return 8 if correction == torch.int8 else 0


def join(weight: Tensor, correction: Tensor) -> Tensor:
    """[n] bf16 and [n] int8 or int16 -> [n] fp32.

    A correction that would turn its weight into a NaN belongs to another: somebody set the weight. It counts
    as 0. Any other moves the weight by at most half a unit in its last place.
    """
    high = (weight.view(torch.int16).to(torch.int64) << 16) & _WORD
    word = (high + (correction.to(torch.int64) << dropped_bits(correction.dtype))) & _WORD
    joined = _float_of(word)
    return torch.where(torch.isnan(joined), weight.to(torch.float32), joined)


def split(value: Tensor, correction: torch.dtype, random_bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """[n] fp32 -> ([n] bf16, [n] int8 or int16). ``random_bits``: 16 an element, None rounds to nearest."""
    word = value.view(torch.int32).to(torch.int64) & _WORD
    dropped = dropped_bits(correction)
    if dropped:
        half = (1 << (dropped - 1)) - 1
        nearest = half + (word >> dropped & 1)
        word = word + (nearest if random_bits is None else random_bits >> (16 - dropped))
        word = word & (_WORD - (1 << dropped) + 1)
    word = torch.where(torch.isnan(value), _NAN, word)
    high = (word + 0x8000) >> 16
    low = (word - (high << 16)) >> dropped
    return _int16(high).view(torch.bfloat16), low.to(correction)


def converted(correction: Tensor, dtype: torch.dtype) -> Tensor:
    """A correction in another width; to the nearest that goes beside the same bfloat16 where it is narrower."""
    if correction.dtype == dtype:
        return correction
    if dtype == torch.int16:
        return correction.to(torch.int16) << 8
    return ((correction.to(torch.int32) + 0x80) >> 8).clamp(max=127).to(torch.int8)


def _float_of(word: Tensor) -> Tensor:
    return torch.where(word > 0x7FFFFFFF, word - (1 << 32), word).to(torch.int32).view(torch.float32)


def _int16(high: Tensor) -> Tensor:
    high = high & 0xFFFF
    return torch.where(high > 0x7FFF, high - (1 << 16), high).to(torch.int16)
