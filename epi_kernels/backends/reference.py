"""The reference stages behind the backend interface: any device that holds values, float64 included."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from epi_kernels.backends.batch import StepBatch
from epi_kernels.reference import mask, stats, step, threshold
from epi_kernels.reference.rounding import stream_key
from epi_kernels.reference.runs import pieces
from epi_kernels.reference.scalars import StepScalars, reciprocal_scale, step_scalars
from epi_kernels.reference.stats import LayerStats, ScoreTerms
from epi_kernels.reference.tensors import ParamTensors
from epi_kernels.reference.threshold import KthSearch


class ReferenceBackend:
    name = "reference"
    counts_on_device = False
    captures = False
    places_runs = True

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type == "meta":
            return "tensors on meta hold no values: materialise with to_empty first"
        if dtype in (torch.float32, torch.bfloat16, torch.float64):
            return None
        return f"the reference backend has no {dtype} path"

    def step(
        self,
        batch: StepBatch,
        *,
        seed: int,
        stochastic_rounding: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        stats: LayerStats | None = None,
    ) -> None:
        if found_inf is not None and bool(found_inf):
            return
        multiplier = None if grad_scale is None else reciprocal_scale(float(grad_scale))
        scalars_of = functools.cache(step_scalars)
        counts = batch.counts.next() if batch.cut is None else batch.counts.next()[batch.cut.first]
        for item, grad, t in zip(batch.items, batch.grads, counts.tolist(), strict=True):
            assert item.hyper is not None and grad is not None
            scalars = scalars_of(t, item.hyper, double=item.param.dtype == torch.float64)
            key = stream_key(seed, t, item.rng_id) if stochastic_rounding else None
            _step(item, grad, scalars, key, multiplier)
        batch.counts.advance()
        if stats is not None:
            self.accumulate([item for item in batch.items if item.layer >= 0], stats)

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


def _step(
    item: ParamTensors, grad: Tensor, scalars: StepScalars, key: int | None, multiplier: float | None
) -> None:
    if item.runs is None:
        step.step_(item, grad, scalars, rng_key=key, grad_multiplier=multiplier)
        return
    dense_grad = grad.contiguous()
    dense = replace(item, param=item.param.contiguous(), grad=dense_grad)
    for piece in pieces(dense):
        assert piece.grad is not None
        step.step_(piece, piece.grad, scalars, rng_key=key, grad_multiplier=multiplier)
    if dense.param is not item.param:
        item.param.copy_(dense.param)
    if dense_grad is not grad and multiplier is not None:
        grad.copy_(dense_grad)
