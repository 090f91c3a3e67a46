"""A refresh: stats -> threshold -> mask, over every device and backend that holds parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epi_kernels.backends.protocol import Backend
from epi_kernels.optim.arguments import IsolationConfig
from epi_kernels.optim.report import IsolationReport
from epi_kernels.policies import selection
from epi_kernels.policies.layers import LayerTable
from epi_kernels.reference.stats import LayerStats, ScoreTerms, score_terms
from epi_kernels.reference.tensors import ParamTensors
from epi_kernels.reference.threshold import KthSearch


@dataclass(slots=True)
class Partition:
    """Parameters with state that one backend handles on one device."""

    device: torch.device
    backend: Backend
    tensors: list[ParamTensors]
    stats_pending: list[ParamTensors]  # eligible, and not covered by the step that led here


class StatsByDevice:
    """One set of accumulators a device, filled by step kernels or stand-alone, merged for the scores."""

    def __init__(self, layers: int, config: IsolationConfig) -> None:
        self._layers = layers
        self._with_moments = config.normalization == "zscore"
        self._stats: dict[torch.device, LayerStats] = {}

    def on(self, device: torch.device) -> LayerStats:
        if device not in self._stats:
            self._stats[device] = LayerStats.empty(self._layers, device, with_moments=self._with_moments)
        return self._stats[device]

    def merged(self, device: torch.device) -> LayerStats:
        total = self.on(device)
        for other_device, other in self._stats.items():
            if other_device != device:
                total.minimum = torch.minimum(total.minimum, other.minimum.to(device))
                total.maximum = torch.maximum(total.maximum, other.maximum.to(device))
                total.nonfinite += other.nonfinite.to(device)
                total.moments += other.moments.to(device)
        return total


def refresh(
    partitions: Sequence[Partition],
    table: LayerTable,
    stateless: Sequence[int],  # per layer: elements without state, whose u is 0
    stats_by_device: StatsByDevice,
    config: IsolationConfig,
    step: int,
) -> IsolationReport:
    """Writes every mask anew. ``stats_by_device`` may already hold what the step kernel reduced."""
    device = partitions[0].device if partitions else torch.device("cpu")
    zeros = torch.tensor(stateless, dtype=torch.int64, device=device)
    k, domain = _domains(table, config)

    stats = _stats(partitions, stats_by_device, zeros, device)
    terms = score_terms(stats, torch.tensor(table.n_elements, device=device), config.normalization)
    search = _threshold(partitions, table, terms, k, domain, zeros, config, device)
    drift = _mask(partitions, table, terms, search, device)

    return IsolationReport(
        step=step,
        ratio=config.isolation_ratio,
        scope=config.scope,
        table=table,
        k=k,
        threshold=search.threshold,
        count_ge=search.count_ge,
        domain=domain,
        drift=drift,
        nonfinite=stats.nonfinite,
    )


def _stats(
    partitions: Sequence[Partition], stats_by_device: StatsByDevice, zeros: Tensor, device: torch.device
) -> LayerStats:
    for part in partitions:
        part.backend.accumulate(part.stats_pending, stats_by_device.on(part.device))
    stats = stats_by_device.merged(device)
    stats.add_zeros(zeros)
    return stats


def _mask(
    partitions: Sequence[Partition],
    table: LayerTable,
    terms: ScoreTerms,
    search: KthSearch,
    device: torch.device,
) -> Tensor:
    """Writes the masks; returns isolated, entered and released of every layer ([layers, 3] int64)."""
    eligible = torch.tensor(table.eligible, dtype=torch.bool, device=device)
    thresholds = torch.where(eligible, search.threshold[search.domain], torch.inf)
    drift = torch.zeros(len(table.names), 3, dtype=torch.int64, device=device)
    for part in partitions:
        part_drift = drift if part.device == device else torch.zeros_like(drift, device=part.device)
        masked = [item for item in part.tensors if item.isolation_mask is not None]
        part_terms = _terms_to(terms, part.device)
        part.backend.select(masked, part_terms, thresholds.to(part.device), search.keep_factor, part_drift)
        if part_drift is not drift:
            drift += part_drift.to(device)
    return drift


def _domains(table: LayerTable, config: IsolationConfig) -> tuple[list[int], list[int]]:
    """k of every search domain, and the domain of every layer (ineligible layers are never counted)."""
    if config.scope == "global":
        return [selection.selected_count(config.isolation_ratio, table.total_eligible)], [0] * len(
            table.names
        )
    k, domain = [], []
    for n_elements, eligible in zip(table.n_elements, table.eligible, strict=True):
        domain.append(len(k) if eligible else 0)
        if eligible:
            k.append(selection.selected_count(config.isolation_ratio, n_elements))
    return k or [0], domain


def _threshold(
    partitions: Sequence[Partition],
    table: LayerTable,
    terms: ScoreTerms,
    k: list[int],
    domain: list[int],
    zeros: Tensor,
    config: IsolationConfig,
    device: torch.device,
) -> KthSearch:
    factor = selection.keep_factor(config.hysteresis)
    floor, end = selection.key_range(config.normalization, factor)
    bits = selection.bin_bits(len(k))
    search = KthSearch.start(
        torch.tensor(k, dtype=torch.int64, device=device),
        torch.tensor(domain, dtype=torch.int64, device=device),
        floor=floor,
        end=end,
        bin_bits=bits,
        keep_factor=factor,
    )

    def counting_pass(stride: int) -> None:
        search.histogram.zero_()
        for part in partitions:
            counted = [item for item in part.tensors if table.eligible[item.layer]]
            if part.device == device:
                part.backend.count(counted, terms, search, stride)
            else:
                local = _search_on(search, part.device)
                part.backend.count(counted, _terms_to(terms, part.device), local, stride)
                search.histogram += local.histogram.to(device)
        search.add_zero_elements(terms, zeros // stride)

    if table.total_eligible >= selection.SAMPLE_FROM_ELEMENTS and any(k):
        counting_pass(selection.SAMPLE_STRIDE)
        sizes = torch.zeros_like(search.k)
        eligible = [(d, n) for d, n, ok in zip(domain, table.n_elements, table.eligible, strict=True) if ok]
        index = torch.tensor([d for d, _ in eligible], dtype=torch.int64, device=device)
        sizes.index_add_(0, index, torch.tensor([n for _, n in eligible], dtype=torch.int64, device=device))
        search.bracket_from_sample(sizes)
    # a wrong bracket costs one pass, then every pass gains bin_bits of the 32; a GPU is never asked
    # whether it is done, its kernels return at once where it is
    for _ in range(1 + -(-32 // bits)):
        if device.type == "cpu" and bool(search.done.all()):
            break
        counting_pass(1)
        search.select()
    return search


def _terms_to(terms: ScoreTerms, device: torch.device) -> ScoreTerms:
    return dataclasses.replace(terms, shift=terms.shift.to(device), scale=terms.scale.to(device))


def _search_on(search: KthSearch, device: torch.device) -> KthSearch:
    """The brackets on another device, with a histogram of its own."""
    moved = {
        field.name: value.to(device)
        for field in dataclasses.fields(search)
        if isinstance(value := getattr(search, field.name), Tensor)
    }
    moved["histogram"] = torch.zeros_like(search.histogram, device=device)
    return dataclasses.replace(search, **moved)
