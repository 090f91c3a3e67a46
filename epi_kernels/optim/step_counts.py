"""``step`` of a saved state: a number of whatever type."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def read_step(value: Any, what: str) -> Tensor:
    """fp32 [] on the host: the steps a state has taken, saved in whatever type.

    Raises:
        ValueError: it is no whole number >= 0, or one that float32 does not hold (they end at 2^24): rounded, the steps
            after it would have other bits.
    """
    number = _one_number(value)
    if number is None or not 0 <= number < math.inf or number % 1:  # nan compares false
        raise ValueError(f"{what}: step must be one whole number >= 0, got {value!r}")
    # 1e38: an int may be too large for a float
    step = torch.tensor(float(min(number, 1e38)), dtype=torch.float32, device="cpu")
    if step.item() != number:
        raise ValueError(f"{what}: step must be a number that float32 holds, got {value!r}")
    return step


def _one_number(value: Any) -> int | float | None:
    if isinstance(value, Tensor):
        plain = value.layout == torch.strided and not value.is_meta and not value.is_complex()
        return value.item() if plain and value.numel() == 1 else None
    return value if isinstance(value, (int, float)) else None
