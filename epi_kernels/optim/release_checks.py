"""What does not go together with gradient release, found before anything changes."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from epi_kernels.optim.entries import Entry

T = TypeVar("T")

HOOK_MODULE = "epi_kernels.optim.release"  # where its hooks are defined

NO_SCALER = (
    "gradient release with torch.amp.GradScaler: whether a step is skipped (found_inf) is known only when all gradients "
    "are there. Train in bfloat16 without a scaler, or call remove() on the handle of enable_gradient_release"
)


def second_gradient(name: str) -> str:
    return (
        f"{name} has a second gradient, and was stepped with the first: call optimizer.step() after every backward(), or "
        "pass accumulation_steps=n to enable_gradient_release for n backwards a step. After a backward that was broken "
        "off, optimizer.step() ends that step; zero_grad() drops this gradient"
    )


def check_model(model: nn.Module, entries: Sequence[Entry]) -> None:
    held = set(model.parameters())
    strangers = [entry.name for entry in entries if entry.param not in held]
    if strangers:
        raise ValueError(
            f"the optimizer steps {', '.join(strangers[:5])}, which the model has not: pass the module that holds all its "
            "parameters (torch.nn.ModuleList of several)"
        )
    stepped = {entry.param for entry in entries}
    for name, module in model.named_modules():
        sparse = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
        if sparse and module.weight in stepped:
            raise RuntimeError(f"{name or type(module).__name__} has sparse gradients: use sparse=False")
    for entry in entries:
        hooks = getattr(entry.param, "_post_accumulate_grad_hooks", None) or {}
        if any(getattr(hook, "__module__", None) == HOOK_MODULE for hook in hooks.values()):
            raise RuntimeError(f"the gradient of {entry.name} is released by another optimizer already")


def check_processwide(entries: Iterable[Entry], *, scalers: bool = False) -> None:
    """Refuses what neither model nor optimizer show: DistributedDataParallel around a module that knows nothing of it, and
    a GradScaler that has scaled a loss. Looks at every object once: tenths of a second with a million of them."""
    names = {entry.param: entry.name for entry in entries}
    for one in _objects_of(DistributedDataParallel):
        shared = [names[param] for param in one.parameters() if param in names]
        if shared:
            raise RuntimeError(
                f"DistributedDataParallel averages the gradient of {shared[0]} over the ranks after it would be "
                "released: use FSDP2 (torch.distributed.fsdp.fully_shard), or no gradient release"
            )
    if scalers and any(
        one.is_enabled() and one._scale is not None for one in _objects_of(torch.amp.GradScaler)
    ):
        raise RuntimeError(NO_SCALER)


def _objects_of(kind: type[T]) -> list[T]:
    """All there are in this process. ``type`` and not ``isinstance``: some objects answer by importing what they stand
    for."""
    found = gc.get_objects()
    kinds = {one for one in set(map(type, found)) if issubclass(one, kind)}
    return [one for one in found if type(one) in kinds] if kinds else []
