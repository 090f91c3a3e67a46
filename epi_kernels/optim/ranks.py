"""What the ranks of a sharded optimizer must agree on before they reduce anything together."""

from __future__ import annotations

import dataclasses
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from epi_kernels.distributed.shards import is_sharded
from epi_kernels.distributed.world import Holding, World, by_all, holding
from epi_kernels.optim.arguments import GROUP_OPTIONS, IsolationConfig
from epi_kernels.optim.compact import whole_masks
from epi_kernels.optim.entries import Entry
from epi_kernels.optim.masks import MASK_KEYS
from epi_kernels.optim.schedules import STEP_KEY

T = TypeVar("T")

# layers are compared one by one; which backend steps, and where, is each rank's own affair, for all give the same bits
_OWN = ("layer_key", "backend", "offload")


def check_named(param_groups: Sequence[dict[str, Any]]) -> None:
    """
    Raises:
        ValueError: parameters have no names, by which ranks tell them apart.
    """
    if not all("param_names" in one for one in param_groups):
        raise ValueError(
            "ranks tell parameters apart by name, and this optimizer's have none: pass (name, tensor) pairs, with "
            "the names that the parameters have in the whole model"
        )


def check_maker() -> None:
    """
    Raises:
        NotImplementedError: torch's ZeroRedundancyOptimizer is making the optimizer at hand: each rank has some of the
            parameters, without names, and would select among those alone.
    """
    # who makes one has imported it
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):
            raise NotImplementedError(
                "ZeroRedundancyOptimizer shares parameters out, and each rank would select a mask among its own: use FSDP2, "
                "torch.distributed.fsdp.fully_shard, or DistributedDataParallel with the optimizer by itself"
            )
        frame = frame.f_back


def settings(config: IsolationConfig) -> dict[str, Any]:
    return {
        field.name: _told(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in _OWN
    }


def _told(value: Any) -> Any:
    """Functions differ from process to process: what they give for a refresh is compared there."""
    return "a function of T" if callable(value) else value


def holdings(entries: Sequence[Entry], config: IsolationConfig) -> list[Holding]:
    return [
        holding(
            param,
            name,
            eligible=group["isolate"],
            layer_key=config.layer_key,
            options={key: _plain(group[key]) for key in GROUP_OPTIONS if key != "isolate"},
        )
        for group, param, name, _ in entries
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return value if value is None or isinstance(value, bool) else float(value)


def agree_once(
    world: World | None,
    entries: Sequence[Entry],
    config: IsolationConfig,
    *,
    votes: bool = False,
    refused: Exception | None = None,
) -> bool | None:
    """Before the first step, and after what the ranks know has changed: a call of all of them, before any other.

    Returns whether all of them vote yes; None where they had agreed before, or there are no others. ``refused``: why this
    rank cannot go on, which all of them raise.
    """
    if world is None or world.agreed:
        return None
    step = entries[0].group[STEP_KEY] if entries else 0
    return world.agree(holdings(entries, config), settings(config), step, votes=votes, refused=refused)


def compare(
    entries: Sequence[Entry], states: Mapping[Tensor, Mapping[str, Any]], config: IsolationConfig
) -> None:
    """Settings, options, T and masks: a call of all of them.

    Raises:
        ValueError: on every rank: they are not the same.
    """

    def held() -> list[Holding]:
        return [
            replace(one, options=one.options + _of_masks(entry.param, states.get(entry.param) or {}))
            for one, entry in zip(holdings(entries, config), entries, strict=True)
        ]

    if dist.is_initialized():
        World().agree(by_all(held), settings(config), entries[0].group[STEP_KEY] if entries else 0)


def compare_settings(entries: Sequence[Entry], config: IsolationConfig) -> None:
    """Before a load, which brings the rest; else as ``compare``."""
    if dist.is_initialized():
        held = by_all(lambda: [replace(one, options=()) for one in holdings(entries, config)])
        World().agree(held, settings(config), step=0)


def _of_masks(param: Tensor, state: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Of a sharded parameter each rank has a part: whether there is one, which is the same on all."""
    if is_sharded(param):
        return tuple((f"{key} (set on it)", key in state) for key in MASK_KEYS)
    masks = whole_masks(state, param)
    return tuple(
        (f"{key} (its CRC)", zlib.crc32(masks[key].cpu().numpy().tobytes()) if key in masks else None)
        for key in MASK_KEYS
    )


def all_or_none(read: Callable[[], T], world: World | None, device: torch.device) -> T:
    """What ``read`` gives, where no rank's refuses.

    Raises:
        Exception: what it raised here; ValueError where it did on another rank alone.
    """
    found, refused = None, None
    try:
        found = read()
    except Exception as error:
        refused = error
    if world is not None and world.any(refused is not None, device):
        refused = refused or ValueError(
            "another rank refused what it was given: nothing has changed here either"
        )
    if refused is not None:
        raise refused
    return found  # type: ignore[return-value]  # read() has ended
