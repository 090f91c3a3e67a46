"""A refresh: stats -> threshold -> mask, over every device and backend that holds parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from epi_kernels.backends import choose
from epi_kernels.backends.protocol import Backend
from epi_kernels.distributed import shards
from epi_kernels.distributed.world import World
from epi_kernels.optim.arguments import IsolationConfig
from epi_kernels.optim.entries import Entry, param_tensors
from epi_kernels.optim.home import home
from epi_kernels.optim.report import IsolationReport
from epi_kernels.optim.state import complete_state
from epi_kernels.policies import selection
from epi_kernels.policies.layers import LayerTable
from epi_kernels.reference.runs import pieces
from epi_kernels.reference.stats import LayerStats, ScoreTerms, score_terms
from epi_kernels.reference.tensors import ParamTensors
from epi_kernels.reference.threshold import KthSearch, SearchProblem


@dataclass(slots=True)
class Partition:
    """Parameters with state that one backend handles on one device."""

    device: torch.device
    backend: Backend
    counted: list[ParamTensors] = field(default_factory=list)  # what this rank counts
    repeated: list[ParamTensors] = field(default_factory=list)  # another rank counts what it also holds
    stats_pending: list[ParamTensors] = field(
        default_factory=list
    )  # counted, eligible, not covered by the step


def partition(
    entries: Sequence[Entry],
    state_of: Mapping[Tensor, dict[str, Any]],
    layers: LayerTable,
    covered: set[Tensor],  # parameters whose stats the step has already reduced
    config: IsolationConfig,
) -> tuple[list[Partition], list[int]]:
    """Parameters with state by backend and device; per layer, the eligible elements without any, as this rank counts."""
    stateless = [0] * len(layers.names)
    partitions: dict[tuple[str, torch.device], Partition] = {}
    for group, param, _, _ in entries:
        row, state = layers.row_of[param], state_of.get(param)
        if not state:
            counted = group["isolate"] and param in layers.counted
            stateless[row] += shards.local(param).numel() if counted else 0
            continue
        complete_state(state, param, group, config)
        device = home(param, config)
        backend = choose(config.backend, device, param.dtype).backend
        part = partitions.setdefault((backend.name, device), Partition(device, backend))
        tensors = param_tensors(param, state, group, row)
        (part.counted if param in layers.counted else part.repeated).append(tensors)
        stateless[row] += tensors.n_stateless if group["isolate"] and param in layers.counted else 0
        if group["isolate"] and param in layers.counted and param not in covered:
            # sums of float64 depend on their order, which is then that of a step
            by_runs = config.normalization == "zscore"
            part.stats_pending.extend(pieces(tensors, of_weight=False) if by_runs else [tensors])
    return list(partitions.values()), stateless


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


def reduce_stats(
    entries: Sequence[Entry],
    state_of: Mapping[Tensor, dict[str, Any]],
    layers: LayerTable,
    stats: StatsByDevice,
    config: IsolationConfig,
) -> None:
    """Stats of parameters that were stepped one by one: in their order, as in the kernels of one step over all of them, for
    sums of float64 (zscore) depend on it."""
    entries = [entry for entry in entries if entry.param.numel() > 0]
    for part in partition(entries, state_of, layers, set(), config)[0]:
        part.backend.accumulate(part.stats_pending, stats.on(part.device))


def refresh(
    partitions: Sequence[Partition],
    table: LayerTable,
    stateless: Sequence[int],  # per layer: elements without state, whose u is 0
    stats_by_device: StatsByDevice,
    config: IsolationConfig,
    step: int,
    world: World | None,
    device: torch.device,  # of the values that are reduced over devices and ranks
) -> IsolationReport:
    """Writes every mask anew. ``stats_by_device`` may already hold what the step kernel reduced.

    ``world``: ranks that select together; None where this rank holds every element that is selected.
    """
    zeros = torch.tensor(stateless, dtype=torch.int64, device=device)
    k, domain = _domains(table, config)

    stats = _stats(partitions, stats_by_device, zeros, device)
    if world is not None:
        world.merge_stats_(stats)
    terms = score_terms(stats, torch.tensor(table.n_elements, device=device), config.normalization)
    found = _threshold(partitions, table, terms, k, domain, zeros, config, world, device)
    drift = _mask(partitions, table, terms, found, device)
    if world is not None:
        world.sum_report_(drift, stats)

    return IsolationReport(
        step=step,
        ratio=config.isolation_ratio,
        interval=config.mask_interval,
        scope=config.scope,
        table=table,
        k=k,
        threshold=found.threshold,
        count_ge=found.count_ge,
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
    found: Thresholds,
    device: torch.device,
) -> Tensor:
    """Writes the masks; returns isolated, entered and released of every layer ([layers, 3] int64)."""
    eligible = torch.tensor(table.eligible, dtype=torch.bool, device=device)
    thresholds = torch.where(eligible, found.threshold[found.domain], torch.inf)
    drift = torch.zeros(len(table.names), 3, dtype=torch.int64, device=device)
    for part in partitions:
        part_drift = drift if part.device == device else torch.zeros_like(drift, device=part.device)
        part_terms, part_thresholds = _terms_to(terms, part.device), thresholds.to(part.device)
        for tensors, into in ((part.counted, part_drift), (part.repeated, torch.zeros_like(part_drift))):
            masked = [item for item in tensors if item.isolation_mask is not None]
            part.backend.select(masked, part_terms, part_thresholds, found.keep_factor, into)
        if part_drift is not drift:
            drift += part_drift.to(device)
    without_state = [0] * len(table.names)
    for part in partitions:
        for item in part.counted:
            without_state[item.layer] += item.n_stateless
    if any(without_state):  # isolated persistently, before as after
        drift[:, 0] += torch.tensor(without_state, dtype=torch.int64, device=device)
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


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What the threshold stage found, and what it takes to apply it."""

    threshold: Tensor  # [domains] fp32, +inf where nothing is selected
    count_ge: Tensor  # [domains] int64: finite eligible elements at or above it
    domain: Tensor  # [layers] int64
    keep_factor: float


def _threshold(
    partitions: Sequence[Partition],
    table: LayerTable,
    terms: ScoreTerms,
    k: list[int],
    domain: list[int],
    zeros: Tensor,
    config: IsolationConfig,
    world: World | None,
    device: torch.device,
) -> Thresholds:
    factor = selection.keep_factor(config.hysteresis)
    floor, end = selection.key_range(config.normalization, factor)
    sizes = [0] * len(k)
    for d, n, eligible in zip(domain, table.n_elements, table.eligible, strict=True):
        sizes[d] += n if eligible else 0
    problem = SearchProblem(
        k=torch.tensor(k, dtype=torch.int64, device=device),
        domain=torch.tensor(domain, dtype=torch.int64, device=device),
        n_elements=torch.tensor(sizes, dtype=torch.int64, device=device),
        zeros=zeros,
        floor=floor,
        end=end,
        bin_bits=selection.bin_bits(len(k)),
        keep_factor=factor,
    )
    counted = [[item for item in part.counted if table.eligible[item.layer]] for part in partitions]
    # a backend that holds every element may search by itself, without a word to the host in between
    only = partitions[0].backend if world is None and len(partitions) == 1 else None
    alone = getattr(only, "find_thresholds", None)
    if alone is not None:
        threshold, count_ge = alone(counted[0], terms, problem)
    else:
        sampled = table.total_eligible >= selection.SAMPLE_FROM_ELEMENTS and any(k)
        search = _search(partitions, counted, terms, problem, world, device, sampled=sampled)
        threshold, count_ge = search.threshold, search.count_ge
    return Thresholds(threshold, count_ge, problem.domain, factor)


def _search(
    partitions: Sequence[Partition],
    counted: Sequence[Sequence[ParamTensors]],  # per partition: what is eligible
    terms: ScoreTerms,
    problem: SearchProblem,
    world: World | None,
    device: torch.device,
    *,
    sampled: bool,
) -> KthSearch:
    """Counting passes over all partitions and ranks, with the brackets on ``device``."""
    search = KthSearch.start(problem)

    def counting_pass(stride: int) -> None:
        search.histogram.zero_()
        for part, tensors in zip(partitions, counted, strict=True):
            if part.device == device:
                part.backend.count(tensors, terms, search, stride)
            else:
                local = _search_on(search, part.device)
                part.backend.count(tensors, _terms_to(terms, part.device), local, stride)
                search.histogram += local.histogram.to(device)
        search.add_zero_elements(terms, problem.zeros // stride)
        if world is not None:
            world.sum_(search.histogram)

    if sampled:
        counting_pass(selection.SAMPLE_STRIDE)
        search.bracket_from_sample(problem.n_elements)
    # a wrong bracket costs one pass, then every pass gains bin_bits of the 32. A GPU by itself is not asked whether it is
    # done, its kernels return at once where it is; between ranks, who have waited for it already, a pass is an all-reduce
    asks = device.type == "cpu" or world is not None
    for _ in range(1 + -(-32 // problem.bin_bits)):
        if asks and bool(search.done.all()):
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
