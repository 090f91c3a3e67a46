"""Stage 1 on every device and backend: the parameters that have gradients, grouped and stepped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epi_kernels.backends import Backend, choose
from epi_kernels.optim.arguments import IsolationConfig
from epi_kernels.optim.refresh import StatsByDevice
from epi_kernels.optim.state import MASK_KEYS, MOMENT_KEYS, complete_state, shares_importance
from epi_kernels.policies.layers import LayerTable
from epi_kernels.reference.bits import packed_bytes
from epi_kernels.reference.rounding import stream_key
from epi_kernels.reference.scalars import StepScalars, step_scalars
from epi_kernels.reference.tensors import ParamTensors


class Entry(NamedTuple):
    """One parameter as the optimizer lists it."""

    group: dict[str, Any]
    param: Tensor
    name: str
    rng_id: int  # CRC-32 of the name, or the position when unnamed


def check_gradient(entry: Entry, requested_backend: str, *, written: bool) -> None:
    """Refuses what no backend steps, before anything changes. ``written``: a loss scale is divided out of it."""
    param, name, grad = entry.param, entry.name, entry.param.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {name} is sparse, which MaskedEMAAdamW does not support: "
            "use sparse=False in the embedding, or torch.optim.SparseAdam for it"
        )
    if grad.dtype != param.dtype or grad.shape != param.shape or grad.device != param.device:
        raise RuntimeError(
            f"the gradient of {name} is {grad.dtype} {list(grad.shape)} on {grad.device}, "
            f"its parameter {param.dtype} {list(param.shape)} on {param.device}"
        )
    if written and any(stride == 0 and n > 1 for stride, n in zip(grad.stride(), grad.shape)):
        raise RuntimeError(
            f"the gradient of {name} is expanded (several elements share one place in memory), so a loss scale cannot "
            "be divided out of it in place: use .contiguous() on it"
        )
    choose(requested_backend, param.device, param.dtype)


_MOMENT_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def check_state(entry: Entry, state: Mapping[str, Any]) -> None:
    """Refuses state that does not fit its parameter: kernels trust sizes and addresses.

    It happens when a parameter is resized or moved after the first step.
    """
    param = entry.param
    for key in MOMENT_KEYS:
        value = state.get(key)
        if value is not None and not (
            value.shape == param.shape
            and value.device == param.device
            and value.dtype in _MOMENT_DTYPES
            and value.is_contiguous()
        ):
            _refuse_state(entry, key, value)
    if state and state["exp_avg"].dtype != state["exp_avg_sq"].dtype:
        _refuse_state(entry, "exp_avg", state["exp_avg"])
    for key in MASK_KEYS:
        value = state.get(key)
        if value is not None and not (
            value.shape == (packed_bytes(param.numel()),)
            and value.device == param.device
            and value.dtype == torch.uint8
        ):
            _refuse_state(entry, key, value)


def _refuse_state(entry: Entry, key: str, value: Tensor) -> None:
    param = entry.param
    raise RuntimeError(
        f"the state {key!r} of {entry.name} is {value.dtype} {list(value.shape)} on {value.device} and does not fit "
        f"its parameter, {param.dtype} {list(param.shape)} on {param.device}. If the parameter was resized or moved "
        "after a step, make a new optimizer (carry_importance starts it from this one where shapes agree)"
    )


def param_tensors(
    param: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], layer: int
) -> ParamTensors:
    return ParamTensors(
        param=param,
        grad=None,
        exp_avg=state["exp_avg"],
        exp_avg_sq=state["exp_avg_sq"],
        importance=None if shares_importance(group) else state["importance"],
        isolation_mask=state.get("isolation_mask"),
        persistent_mask=state.get("persistent_mask"),
        layer=layer,
    )


def _stores_bfloat16(tensors: ParamTensors) -> bool:
    importance = tensors.importance
    return (
        tensors.param.dtype == torch.bfloat16
        or tensors.exp_avg.dtype == torch.bfloat16
        or (importance is not None and importance.dtype == torch.bfloat16)
    )


class _Scalars:
    """Host scalars of a step, computed once for the parameters that share group and ``t``."""

    def __init__(self) -> None:
        self._cache: dict[tuple[int, int, bool], StepScalars] = {}

    def of(self, group: Mapping[str, Any], t: int, dtype: torch.dtype) -> StepScalars:
        double = dtype == torch.float64
        key = (id(group), t, double)
        if key not in self._cache:
            self._cache[key] = step_scalars(
                t,
                lr=float(group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                importance_beta=group["importance_beta"],
                double=double,
            )
        return self._cache[key]


def run_step(
    entries: Sequence[Entry],
    state_of: Mapping[Tensor, dict[str, Any]],
    config: IsolationConfig,
    *,
    grad_multiplier: float | None,
    layers: LayerTable | None,
    stats: StatsByDevice | None,
) -> None:
    """Steps every entry; with ``stats``, layer statistics are reduced in the same pass."""
    # scalars first: a group's value that cannot be computed with must not leave new state behind
    cache, t_of, scalars_of = _Scalars(), [], []
    for group, param, _, _ in entries:
        state = state_of.get(param)
        t_of.append(int(state["step"]) + 1 if state else 1)
        scalars_of.append(cache.of(group, t_of[-1], param.dtype))

    steps: list[Tensor] = []
    batches: dict[tuple[str, torch.device], tuple[Backend, list[ParamTensors]]] = {}
    for (group, param, _, rng_id), t, scalars in zip(entries, t_of, scalars_of, strict=True):
        state = state_of[param]
        complete_state(state, param, group, config)
        steps.append(state["step"])
        if param.numel() == 0:
            continue
        row = layers.row_of[param] if layers is not None and group["isolate"] else -1
        tensors = param_tensors(param, state, group, row)
        assert param.grad is not None
        # a lazily negated gradient keeps its sign beside its memory, where kernels do not look
        tensors.grad, tensors.maximize, tensors.scalars = param.grad.resolve_neg(), group["maximize"], scalars
        if config.stochastic_rounding and _stores_bfloat16(tensors):
            tensors.rng_key = stream_key(config.seed, t, rng_id)
        backend = choose(config.backend, param.device, param.dtype).backend
        batches.setdefault((backend.name, param.device), (backend, []))[1].append(tensors)
    for (_, device), (backend, batch) in batches.items():
        # kernels write through addresses; autograd must still notice that saved weights have changed
        torch.autograd.graph.increment_version([item.param for item in batch])
        backend.step(
            batch,
            stochastic_rounding=config.stochastic_rounding,
            grad_multiplier=grad_multiplier,
            stats=None if stats is None else stats.on(device),
        )
    if steps:
        torch._foreach_add_(steps, 1.0)
