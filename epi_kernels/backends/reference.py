"""The reference stages behind the backend interface: any device, float64 included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels.reference import mask, stats, step, threshold
from epi_kernels.reference.stats import LayerStats, ScoreTerms
from epi_kernels.reference.tensors import ParamTensors
from epi_kernels.reference.threshold import KthSearch


class ReferenceBackend:
    name = "reference"

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype in (torch.float32, torch.bfloat16, torch.float64):
            return None
        return f"the reference backend has no {dtype} path"

    def step(
        self,
        tensors: Sequence[ParamTensors],
        *,
        stochastic_rounding: bool,
        grad_multiplier: float | None,
        stats: LayerStats | None,
    ) -> None:
        for item in tensors:
            step.step_(item, stochastic_rounding=stochastic_rounding, grad_multiplier=grad_multiplier)
        if stats is not None:
            self.accumulate([item for item in tensors if item.layer >= 0], stats)

    def accumulate(self, tensors: Sequence[ParamTensors], stats_: LayerStats) -> None:
        for item in tensors:
            stats.accumulate(item, stats_)

    def count(
        self, tensors: Sequence[ParamTensors], terms: ScoreTerms, search: KthSearch, sample_stride: int = 1
    ) -> None:
        for item in tensors:
            threshold.count(item, terms, search, sample_stride)

    def select(
        self,
        tensors: Sequence[ParamTensors],
        terms: ScoreTerms,
        thresholds: Tensor,
        keep_factor: float,
        drift: Tensor,
    ) -> None:
        for item in tensors:
            mask.select_(item, terms, thresholds, keep_factor, drift)
