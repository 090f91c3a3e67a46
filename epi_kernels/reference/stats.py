"""Stage 2, stats: per layer, what the normalisation needs to know of the importances."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from epi_kernels.reference.tensors import ParamTensors

SLICE = 1 << 18  # elements a slice: bounds the temporaries of a refresh on this backend


def slices(n_elements: int) -> Iterator[tuple[int, int]]:
    """Bounds of consecutive slices; every start is a multiple of 64: a slice owns whole mask bytes and scale blocks."""
    for start in range(0, n_elements, SLICE):
        yield start, min(start + SLICE, n_elements)


@dataclass(slots=True)
class LayerStats:
    """Accumulators of one refresh, one row a layer, on the device of the parameters.

    Only finite importances enter ``minimum``, ``maximum`` and ``moments``. Backends merge into the rows.
    """

    minimum: Tensor  # [layers] fp32, +inf where nothing was seen
    maximum: Tensor  # [layers] fp32, -inf where nothing was seen
    nonfinite: Tensor  # [layers] int64
    moments: Tensor  # [layers, 2] fp64: sum of u, sum of u*u; filled for zscore only
    with_moments: bool

    @classmethod
    def empty(cls, layers: int, device: torch.device, *, with_moments: bool) -> LayerStats:
        return cls(
            torch.full((layers,), torch.inf, dtype=torch.float32, device=device),
            torch.full((layers,), -torch.inf, dtype=torch.float32, device=device),
            torch.zeros(layers, dtype=torch.int64, device=device),
            torch.zeros(layers, 2, dtype=torch.float64, device=device),
            with_moments,
        )

    def add_zeros(self, counts: Tensor) -> None:
        """Elements without state have u = 0: they can only lower the extrema ([layers] int64 counts)."""
        present, zero = counts > 0, torch.zeros_like(self.minimum)
        self.minimum = torch.where(present, torch.minimum(self.minimum, zero), self.minimum)
        self.maximum = torch.where(present, torch.maximum(self.maximum, zero), self.maximum)


def accumulate(tensors: ParamTensors, stats: LayerStats) -> None:
    """Merges one parameter's importances, as stored, into its layer's row."""
    row = tensors.layer
    for start, stop in slices(tensors.n_stored):
        u = tensors.read_u(start, stop)
        finite = torch.isfinite(u)
        stats.nonfinite[row] += (~finite).sum()
        stats.minimum[row] = torch.minimum(stats.minimum[row], torch.where(finite, u, torch.inf).min())
        stats.maximum[row] = torch.maximum(stats.maximum[row], torch.where(finite, u, -torch.inf).max())
        if stats.with_moments:
            wide = torch.where(finite, u, 0.0).double()
            stats.moments[row] += torch.stack([wide.sum(), (wide * wide).sum()])


@dataclass(slots=True)
class ScoreTerms:
    """score(u) = (u - shift) / scale in float32, 0 where scale == 0; one row a layer.

    minmax: shift = min, scale = max - min. zscore: shift = mean, scale = population std.
    none: shift = 0, scale = 1, which leaves u as it is.
    """

    shift: Tensor  # [layers] fp32
    scale: Tensor  # [layers] fp32
    positive_only: bool  # minmax, none: a score must be > 0 to be isolated


def score_terms(stats: LayerStats, n_elements: Tensor, normalization: str) -> ScoreTerms:
    """``n_elements``: [layers] int64, every eligible element, those with u = 0 for want of state included."""
    seen = stats.maximum >= stats.minimum
    zero = torch.zeros_like(stats.minimum)
    if normalization == "none":
        return ScoreTerms(zero, torch.ones_like(zero), positive_only=True)
    if normalization == "minmax":
        shift = torch.where(seen, stats.minimum, zero)
        return ScoreTerms(shift, torch.where(seen, stats.maximum, zero) - shift, positive_only=True)
    count = (n_elements - stats.nonfinite).clamp_min(1).double()
    mean = stats.moments[:, 0] / count
    variance = (stats.moments[:, 1] / count - mean * mean).clamp_min(0.0)
    # equal importances have no spread; their rounded moments may still differ
    std = torch.where(stats.maximum > stats.minimum, variance.sqrt(), torch.zeros_like(variance))
    return ScoreTerms(mean.float(), std.float(), positive_only=False)


def score(u: Tensor, shift: Tensor, scale: Tensor, isolated: Tensor | None, keep_factor: float) -> Tensor:
    """[n] fp32 importances of one layer -> scores; ``keep_factor`` = float32(1 - hysteresis)."""
    result = torch.where(scale == 0, torch.zeros_like(u), (u - shift) / scale)
    if isolated is not None and keep_factor != 1.0:
        factor = torch.full((), keep_factor, dtype=torch.float32, device=u.device)
        result = torch.where(isolated, result / factor, result)
    return result + 0.0  # -0 and +0 are one score
