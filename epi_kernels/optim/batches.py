"""Stage 1 on every device and backend: the parameters that have gradients, grouped and stepped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epi_kernels.backends import Backend, choose
from epi_kernels.optim.arguments import IsolationConfig
from epi_kernels.optim.refresh import StatsByDevice
from epi_kernels.optim.state import complete_state, shares_importance
from epi_kernels.policies.layers import LayerTable
from epi_kernels.reference.rounding import stream_key
from epi_kernels.reference.scalars import StepScalars, step_scalars
from epi_kernels.reference.tensors import ParamTensors


class Entry(NamedTuple):
    """One parameter as the optimizer lists it."""

    group: dict[str, Any]
    param: Tensor
    name: str
    rng_id: int  # CRC-32 of the name, or the position when unnamed


def check_gradient(entry: Entry, requested_backend: str) -> None:
    """Refuses what no backend steps, before anything changes."""
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
    choose(requested_backend, param.device, param.dtype)


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
    scalars, steps = _Scalars(), []
    batches: dict[tuple[str, torch.device], tuple[Backend, list[ParamTensors]]] = {}
    for group, param, _, rng_id in entries:
        state = state_of[param]
        complete_state(state, param, group, config)
        steps.append(state["step"])
        if param.numel() == 0:
            continue
        t = int(state["step"]) + 1
        row = layers.row_of[param] if layers is not None and group["isolate"] else -1
        tensors = param_tensors(param, state, group, row)
        tensors.grad, tensors.maximize = param.grad, group["maximize"]
        tensors.scalars = scalars.of(group, t, param.dtype)
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
