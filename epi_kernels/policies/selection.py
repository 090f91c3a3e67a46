"""How many elements are selected, and where their scores can lie."""

from __future__ import annotations

import math

import torch

from epi_kernels.reference.scalars import round_to_float32
from epi_kernels.reference.threshold import KEY_END, score_keys

# Sampling pays for its pass only where a counting pass is long
SAMPLE_FROM_ELEMENTS = 1 << 20
SAMPLE_STRIDE = 64

MAX_BIN_BITS, MIN_BIN_BITS = 11, 8
HISTOGRAM_BYTES = 256 * 1024  # past this, fewer bins and one more pass


def selected_count(ratio: float, n_elements: int) -> int:
    """k = floor(p * N), in float64."""
    return math.floor(ratio * n_elements)


def keep_factor(hysteresis: float) -> float:
    """What the score of an isolated element is divided by."""
    return round_to_float32(1.0 - hysteresis)


def key_range(normalization: str, factor: float) -> tuple[int, int]:
    """[floor, end) of the ordered keys that a finite importance's score can have."""
    if normalization == "zscore":
        return 0, KEY_END
    zero, one, kept, infinity = torch.tensor([0.0, 1.0, factor, torch.inf], dtype=torch.float32, device="cpu")
    highest = one / kept if normalization == "minmax" else infinity
    return int(score_keys(zero)), int(score_keys(highest)) + 1


def bin_bits(domains: int) -> int:
    """2,048 bins a domain, fewer where many domains would make the histogram large."""
    bits = MAX_BIN_BITS
    while bits > MIN_BIN_BITS and domains * ((1 << bits) + 1) * 8 > HISTOGRAM_BYTES:
        bits -= 1
    return bits
