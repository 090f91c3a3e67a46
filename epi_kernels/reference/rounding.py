"""Counter-based stochastic rounding to bfloat16: the same bits on every backend, after every resume.

The hash is the public "lowbias32" mixer. Sixteen random bits an element and tensor kind are drawn
from two words: theta w0 low, exp_avg w0 high, exp_avg_sq w1 low, importance w1 high.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Words = TypeVar("Words", int, np.ndarray, Tensor)

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def mix(x: Words) -> Words:
    """lowbias32 of uint32 values, held in Python's ints or in int64 arrays or tensors."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def mixed_seed(seed: int) -> int:
    return mix(seed & _WORD)


def stream_key(seed: int, t: Words, rng_id: Words) -> Words:
    """The part of the key that a parameter's elements share: ``mix(mix(mix(seed) ^ t) ^ id)``."""
    return mix(mix(mixed_seed(seed) ^ (t & _WORD)) ^ (rng_id & _WORD))


def logical_index(
    count: int, device: torch.device, *, offset: int = 0, run: int = 0, stride: int = 0
) -> Tensor:
    """[count] int64: where the elements of a shard lie in the whole tensor (``ParamTensors.index_run``)."""
    index = torch.arange(count, dtype=torch.int64, device=device)
    return offset + (index // run * stride + index % run if run else index)


def random_words(key: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """Words w0, w1 ([n] int64 holding uint32) of the elements at ``index`` ([n] int64)."""
    element_key = mix(key ^ (index >> 32))
    w0 = mix((index & _WORD) ^ element_key)
    w1 = mix((w0 + _GOLDEN) & _WORD)
    return w0, w1


def round_bfloat16(x: Tensor, random_bits: Tensor) -> Tensor:
    """[n] fp32 -> bf16: ``(bits + r16) >> 16``; non-finite values round to nearest."""
    bits = x.view(torch.int32).to(torch.int64) & _WORD
    high = ((bits + random_bits) >> 16) & 0xFFFF
    high = torch.where(high >= 0x8000, high - 0x10000, high).to(torch.int16)
    return torch.where(torch.isfinite(x), high.view(torch.bfloat16), x.to(torch.bfloat16))


def exact_sqrt(x: Tensor) -> Tensor:
    """Correctly rounded square root. torch's float32 root on CPUs is an ulp off for some inputs."""
    return x.double().sqrt().to(x.dtype)
