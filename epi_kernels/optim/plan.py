"""Stage 1 over every device and backend: the parameters that have gradients, grouped once and stepped often.

Hundreds of small tensors are bound by the host: what a step checks and gathers of each of them. A plan does it
once, notes what it relied on, and serves until one comparison with the notes fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from epi_kernels.backends import Backend, choose
from epi_kernels.backends.addresses import Watch, addresses
from epi_kernels.backends.batch import LOW_PRECISION, StepBatch, share_storage
from epi_kernels.distributed import shards
from epi_kernels.optim.arguments import (
    GROUP_OPTIONS,
    INT4,
    IsolationConfig,
    check_group_options,
    check_importance,
    shares_importance,
)
from epi_kernels.optim.entries import (
    Entry,
    check_gradient,
    check_state,
    check_written_gradient,
    param_tensors,
)
from epi_kernels.optim.moments import moment_dtype
from epi_kernels.optim.refresh import StatsByDevice
from epi_kernels.optim.state import complete_state
from epi_kernels.policies.layers import LayerTable
from epi_kernels.reference.scalars import HyperParameters
from epi_kernels.reference.tensors import ParamTensors

_DTYPE, _DEVICE, _IS_CPU, _LAYOUT, _SHAPE = map(attrgetter, ("dtype", "device", "is_cpu", "layout", "shape"))
# what may change of a weight while it stays where it is; rows that are not contiguous are read anew at every step
_OF_WEIGHTS = (_DTYPE, _SHAPE, Tensor.is_contiguous)


class StepPlan:
    """The step over the entries that have gradients.

    Raises:
        RuntimeError: a gradient or a state that no backend steps; nothing has changed then.
        ValueError: a param group's value is out of range.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        grads: Sequence[Tensor | None],  # of the entries; of sharded ones, what lies on this rank
        state_of: Mapping[Tensor, dict[str, Any]],
        config: IsolationConfig,
        *,
        written: bool,  # a loss scale will be divided out of the gradients
    ) -> None:
        self._all_params = [entry.param for entry in entries]
        stepped, groups, hyper_of = check_step(entries, grads, state_of, config, written=written)
        self._config = config
        self._stepped = stepped
        self._params = [entry.param for entry in stepped]
        self._sharded = [shards.is_sharded(param) for param in self._params]
        states = [state_of[entry.param] for entry in stepped]
        self._rows: list[ParamTensors] = []
        rows_of: dict[int, list[ParamTensors]] = {id(group): [] for group in groups}
        self._group_rows = [(group, rows_of[id(group)]) for group in groups]
        batches: dict[tuple[str, torch.device], tuple[Backend, list[ParamTensors], list[int]]] = {}
        counted: dict[torch.device, list[dict[str, Any]]] = {}
        backends: list[Backend] = []
        for (group, param, _, _), state in zip(stepped, states, strict=True):
            complete_state(state, param, group, config)
            backend = choose(config.backend, param.device, param.dtype).backend
            backends.append(backend)
            device = param.device if backend.counts_on_device else torch.device("cpu")
            counted.setdefault(device, []).append(state)
        for device, states_there in counted.items():
            share_steps(states_there, device)
        for position, (entry, state, backend) in enumerate(zip(stepped, states, backends, strict=True)):
            group, param, _, rng_id = entry
            tensors = param_tensors(param, state, group, layer=-1)
            tensors.step, tensors.rng_id = state["step"], rng_id
            take_index(tensors, param)
            tensors.hyper, tensors.maximize = hyper_of[id(group)], group["maximize"]
            tensors.lr = group["lr"] if _lr_lies_on_device(group, config) else None
            rows_of[id(group)].append(tensors)
            self._rows.append(tensors)
            _, batch, positions = batches.setdefault((backend.name, param.device), (backend, [], []))
            positions.append(position)
            batch.append(tensors)
        self._batches = [
            _Share(device, backend, StepBatch(batch), positions)
            for (_, device), (backend, batch, positions) in batches.items()
        ]
        for share in self._batches:
            share.batch.capturable = config.capturable
        # what the plan relies on
        self._fixed = self._switches()
        self._missing = [grad is None for grad in grads]
        self._state_values = list(_state_values(state_of))
        self._state_watch = Watch(
            [
                shards.local(value)
                for value in self._state_values
                if isinstance(value, Tensor) and value.layout == torch.strided
            ]
        )
        weights = self._weights()
        self._addresses = addresses(weights)
        on_cpu = all(weight.is_cpu for weight in weights)
        attributes = (_DTYPE, _IS_CPU if on_cpu else _DEVICE, _SHAPE, _LAYOUT)
        self._like = [(of, list(map(of, weights))) for of in attributes]
        self._weights_like = [(of, list(map(of, weights))) for of in _OF_WEIGHTS]
        # a shard's own tensor, which nobody swaps, may be held; looking at the tensors that are there costs less
        self._shards = weights if weights and all(self._sharded) else None
        self._shards_watch = None if self._shards is None else Watch(weights)

    def _weights(self) -> list[Tensor]:
        """What of the parameters lies on this rank; FSDP2 may put other memory under them."""
        return shards.locals_of(self._params, self._sharded) if any(self._sharded) else self._params

    @property
    def counts_on_device(self) -> bool:
        """There is a step, and no part of it reads a scalar on the host."""
        return len(self._batches) > 0 and all(share.backend.counts_on_device for share in self._batches)

    def is_over(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters, with gradients or without, that it was made for."""
        return len(params) == len(self._all_params) and all(map(is_, params, self._all_params))

    def fits(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        state_of: Mapping[Tensor, dict[str, Any]],
        *,
        alike: bool,
    ) -> bool:
        """Whether the plan still is what a new one would be, but for the gradients' addresses and what groups say
        of the step. ``alike``: gradients are known to have their weights' dtype, shape and device."""
        if not self.is_over(params):
            return False
        present = _present(grads)
        if len(present) != len(self._params) or (
            len(present) < len(grads) and [grad is None for grad in grads] != self._missing
        ):
            return False
        if self._switches() != self._fixed or not self._same_state(state_of):
            return False
        weights = self._weights()
        if self._shards_watch is not None and self._shards is not None:
            same_weights = all(map(is_, weights, self._shards)) and self._shards_watch.unmoved()
        else:
            same_weights = np.array_equal(addresses(weights), self._addresses) and all(
                list(map(of, weights)) == like for of, like in self._weights_like
            )
        return same_weights and (alike or all(list(map(of, present)) == like for of, like in self._like))

    def _same_state(self, state_of: Mapping[Tensor, dict[str, Any]]) -> bool:
        return all(map(is_, _state_values(state_of), self._state_values)) and self._state_watch.unmoved()

    def run(
        self,
        grads: Sequence[Tensor | None],
        *,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        layers: LayerTable | None,
        stats: StatsByDevice | None,
    ) -> None:
        """Steps every entry; with ``stats``, layer statistics are reduced in the same pass."""
        self._take_hyper_parameters()
        present = self._readable(_present(grads), written=grad_scale is not None)
        if layers is not None:
            for entry, tensors in zip(self._stepped, self._rows, strict=True):
                counted = entry.group["isolate"] and entry.param in layers.counted
                tensors.layer = layers.row_of[entry.param] if counted else -1
        # kernels write through addresses; autograd must still notice that saved weights have changed
        torch.autograd.graph.increment_version(self._params)
        if any(self._sharded):
            torch.autograd.graph.increment_version(self._weights())
        for device, backend, batch, positions in self._batches:
            batch.grads = present if len(self._batches) == 1 else [present[i] for i in positions]
            backend.step(
                batch,
                seed=self._config.seed,
                stochastic_rounding=self._config.stochastic_rounding,
                grad_scale=None if grad_scale is None else grad_scale.to(device, non_blocking=True),
                found_inf=None if found_inf is None else found_inf.to(device, non_blocking=True),
                stats=None if stats is None else stats.on(device),
            )
            batch.grads = []  # gradients belong to the model: nothing here keeps them alive

    def on_device(self) -> list[Any]:
        """Tables on the device that the kernels of the last step read and write."""
        return [share.batch.device_tables for share in self._batches]

    def a_step(self) -> Tensor | None:
        """The ``step`` of a parameter that is stepped at every call of this plan."""
        return self._rows[0].step if self._rows else None

    def covered(self) -> set[Tensor]:
        """The parameters whose stats a step with stats reduces."""
        return set(self._params)

    def _readable(self, grads: list[Tensor], *, written: bool) -> list[Tensor]:
        """Gradients whose memory holds their values. ``written``: a loss scale is divided out of them in place."""
        if written and not all(map(Tensor.is_contiguous, grads)):
            for entry, grad in zip(self._stepped, grads, strict=True):
                check_written_gradient(entry, grad)
        # a lazily negated gradient keeps its sign beside its memory, where kernels do not look
        return [grad.resolve_neg() for grad in grads] if any(map(Tensor.is_neg, grads)) else grads

    def _take_hyper_parameters(self) -> None:
        fresh = [
            (rows, _hyper_parameters(group, self._config, rows[0].hyper)) for group, rows in self._group_rows
        ]
        for rows, hyper in fresh:
            if hyper != rows[0].hyper:
                for tensors in rows:
                    tensors.hyper = hyper

    def _switches(self) -> list[tuple[bool, bool, bool, int]]:
        return [
            (
                group["maximize"],
                group["isolate"],
                shares_importance(group),
                id(group["lr"]) if _lr_lies_on_device(group, self._config) else 0,
            )
            for group, _ in self._group_rows
        ]


def check_step(
    entries: Sequence[Entry],
    grads: Sequence[Tensor | None],
    state_of: Mapping[Tensor, Mapping[str, Any]],
    config: IsolationConfig,
    *,
    written: bool,
) -> tuple[list[Entry], list[dict[str, Any]], dict[int, HyperParameters]]:
    """What a step would stumble over, before there is state. Returns the entries with gradients, their groups, and what
    these say of the step, by their ids.

    Raises as ``StepPlan``.
    """
    stepped = [entry for entry, grad in zip(entries, grads, strict=True) if grad is not None]
    for entry, grad in zip(stepped, _present(grads), strict=True):
        check_gradient(entry, grad, config)
        if written:
            check_written_gradient(entry, grad)
        check_state(entry, state_of.get(entry.param, {}), config)
        check_index(entry, config)
    groups = list({id(entry.group): entry.group for entry in stepped}.values())
    return stepped, groups, {id(group): _hyper_parameters(group, config) for group in groups}


_ROUNDED = (*LOW_PRECISION, INT4)


def check_index(entry: Entry, config: IsolationConfig) -> None:
    """Refuses a shard whose elements' places in the whole the backend cannot count, where random bits need them."""
    param = entry.param
    kinds = {param.dtype, moment_dtype("exp_avg", param, config)}
    if not shares_importance(entry.group):
        kinds.add(moment_dtype("importance", param, config))
    if not shards.is_sharded(param) or not config.stochastic_rounding or kinds.isdisjoint(_ROUNDED):
        return
    shard = shards.largest_shard(param)
    index = None if shard is None else shard.index()
    backend = choose(config.backend, param.device, param.dtype).backend
    if index is None or (index.run and not backend.places_runs):
        raise RuntimeError(
            f"{entry.name} is sharded as {param.placements}, for which the {backend.name} backend has no stochastic "
            "rounding: shard it along its first dimension, or pass stochastic_rounding=False"
            + ("" if index is None else ', or backend="triton"')
        )


def take_index(tensors: ParamTensors, param: Tensor) -> None:
    """Where a shard's elements lie in the whole: random numbers count logical positions."""
    shard = shards.shard_of(param) if shards.is_sharded(param) else None
    index = None if shard is None else shard.index()
    if index is not None:
        tensors.index_offset, tensors.index_run, tensors.index_stride = index.offset, index.run, index.stride


def _present(grads: Sequence[Tensor | None]) -> list[Tensor]:
    return [grad for grad in grads if grad is not None]


class _Share(NamedTuple):
    """What one backend on one device has of a plan."""

    device: torch.device
    backend: Backend
    batch: StepBatch
    positions: list[int]  # among all gradients


def share_steps(states: Sequence[dict[str, Any]], device: torch.device) -> None:
    """Makes every ``step`` a float32 view of one buffer on ``device``, where they are not yet."""
    steps = [state["step"] for state in states]
    if device.type == "cpu":
        there = share_storage(steps)
    else:
        there = all(step.device == device for step in steps)
    if not there:
        buffer = torch.tensor([float(step) for step in steps], dtype=torch.float32, device=device)
        for state, step in zip(states, buffer.unbind(), strict=True):
            state["step"] = step


def _lr_lies_on_device(group: Mapping[str, Any], config: IsolationConfig) -> bool:
    """Whether a captured step reads the group's lr where it lies: the host must not."""
    return config.capturable and isinstance(group["lr"], Tensor)


def _hyper_parameters(
    group: Mapping[str, Any], config: IsolationConfig, known: HyperParameters | None = None
) -> HyperParameters:
    """What the group says now; checked where it is not what is ``known``, for a schedule may have set anything.

    lr is 0 where it is read on the device (``ParamTensors.lr``): the host does not look at it.
    """
    on_device, options = _lr_lies_on_device(group, config), GROUP_OPTIONS
    if on_device:
        options = [key for key in GROUP_OPTIONS if key != "lr"]
        lr, device = group["lr"], next((param.device for param in group["params"]), group["lr"].device)
        if lr.dtype != torch.float32 or lr.numel() != 1 or lr.device != device:
            raise ValueError(
                f"lr must be a float, or a float32 tensor of one element on {device}, with capturable=True, got {lr!r}"
            )
    try:
        beta1, beta2 = group["betas"]
        beta_u = beta2 if group["importance_beta"] is None else group["importance_beta"]
        values = (
            0.0 if on_device else group["lr"],
            beta1,
            beta2,
            beta_u,
            group["eps"],
            group["weight_decay"],
        )
        hyper = HyperParameters(*map(float, values))
    except (TypeError, ValueError):
        hyper = None
    if hyper is None or hyper != known:
        check_group_options({key: group[key] for key in options})
        check_importance(group, config)
    assert hyper is not None, "options that pass the check are numbers"
    return hyper


_END = object()  # of all values: two of unlike lengths differ there


def _state_values(state_of: Mapping[Tensor, dict[str, Any]]) -> Iterator[Any]:
    return chain(chain.from_iterable(map(dict.values, state_of.values())), (_END,))
