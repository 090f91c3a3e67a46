"""Importance at given weights, and the top sets that isolation would select from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from epi_kernels.backends import choose
from epi_kernels.isolation.overlap import popcount
from epi_kernels.optim.arguments import IsolationConfig
from epi_kernels.optim.refresh import Partition, StatsByDevice, refresh
from epi_kernels.policies.layers import Share, build_layers
from epi_kernels.reference.bits import pack, packed_bytes
from epi_kernels.reference.tensors import ParamTensors
from epi_kernels.repro.measure.kinds import kind_of
from epi_kernels.repro.measure.passes import clip_factor, gradients, trainable
from epi_kernels.repro.stage import Batch, Stage

Masks = dict[str, Tensor]  # by parameter: packed, uint8 [ceil(n / 8)], on the host
ALL = "all"


def mean_squared_gradient(stage: Stage, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Mean over batches of the squared gradient of a batch, clipped as a step's is; fp32, by parameter.

    What an EMA of the squared gradients that the optimizer sees would settle at, were the weights to stand still.
    """
    names, total, count = list(trainable(stage)), None, 0
    for count, batch in enumerate(batches, 1):
        grads = gradients(stage, batch, seed=count)
        factor = clip_factor(stage, grads)
        squares = [(grad.float() * factor).square_() for grad in grads]
        del grads
        if total is None:
            total = squares
        else:
            for one, more in zip(total, squares):
                one.add_(more)
    assert total is not None, "there are batches"
    return {name: one.div_(count) for name, one in zip(names, total, strict=True)}


def top_set(importance: Mapping[str, Tensor], ratio: float) -> Masks:
    """What a refresh would isolate: min-max within each tensor, then the floor(ratio * D) largest of all, and ties.

    The very stages of the optimizer's refresh, on the device of ``importance`` (fp32).
    """
    some = next(iter(importance.values()))
    table = build_layers(Share(u, name, u.numel(), name, True) for name, u in importance.items())
    masks = {
        name: torch.zeros(packed_bytes(u.numel()), dtype=torch.uint8, device=u.device)
        for name, u in importance.items()
    }
    tensors = [
        ParamTensors(u, None, u, u, None, masks[name], None, layer=table.row_of[u])
        for name, u in importance.items()
        if u.numel()
    ]
    part = Partition(some.device, choose("auto", some.device, torch.float32).backend, tensors, [], tensors)
    config = IsolationConfig(
        isolation_ratio=ratio,
        mask_interval=None,
        mask_warmup=None,
        importance_dtype=torch.float32,
        normalization="minmax",
        scope="global",
        layer_key=None,
        hysteresis=0.0,
        state_dtype=None,
        master_weight_bits=16,
        stochastic_rounding=False,
        seed=0,
        backend="auto",
    )
    stats, stateless = StatsByDevice(len(table.names), config), [0] * len(table.names)
    refresh([part], table, stateless, stats, config, 0, None, some.device)
    return {name: mask.cpu() for name, mask in masks.items()}


def isolated_now(stage: Stage) -> Masks | None:
    """The optimizer's own mask; None where it has none, or nothing is isolated yet."""
    mask_of = getattr(stage.optimizer, "isolation_mask", None)
    if mask_of is None:
        return None
    held = {id(param) for group in stage.optimizer.param_groups for param in group["params"]}
    masks = {
        name: pack(mask_of(param)).cpu() for name, param in trainable(stage).items() if id(param) in held
    }
    return masks if any(bool(mask.any()) for mask in masks.values()) else None


def elements_by_kind(stage: Stage) -> dict[str, int]:
    """Trained elements, and those of each kind of parameter."""
    params = trainable(stage)
    total = {ALL: sum(param.numel() for param in params.values())}
    for name, param in params.items():
        total[kind_of(name)] = total.get(kind_of(name), 0) + param.numel()
    return total


def counts(masks: Masks) -> dict[str, int]:
    """Bits set: of all, and of each kind of parameter."""
    found = {ALL: 0}
    for name, mask in masks.items():
        bits, kind = popcount(mask), kind_of(name)
        found[ALL] += bits
        found[kind] = found.get(kind, 0) + bits
    return found


def intersection(first: Masks, second: Masks) -> Masks:
    return {name: mask & second[name] for name, mask in first.items()}
