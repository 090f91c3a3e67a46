"""The layers of a refresh, of this rank or of all, and what is looked at before one begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from epi_kernels.distributed.world import World
from epi_kernels.optim import ranks
from epi_kernels.optim.arguments import IsolationConfig, check_group_options
from epi_kernels.optim.entries import Entry, check_state
from epi_kernels.policies.layers import LayerTable, Share, build_layers


def check_before_refresh(
    entries: Sequence[Entry], state_of: Mapping[Tensor, Mapping[str, Any]], config: IsolationConfig
) -> None:
    """What a refresh would stumble over.

    Raises:
        RuntimeError: a state does not fit its parameter.
        ValueError: a group's ``isolate`` is no bool.
    """
    for entry in entries:
        check_group_options({"isolate": entry.group["isolate"]})
        check_state(entry, state_of.get(entry.param, {}), config)


def find_layers(
    entries: Sequence[Entry],
    now: IsolationConfig,
    world: World | None,
    step: int,
    device: torch.device,
    refused: Exception | None = None,
) -> LayerTable:
    """With a world: a call of all its ranks, which refresh after the same ``step``, or hear why one cannot.

    Raises:
        Exception: ``refused``; a ValueError where another rank has one, or they do not agree.
    """
    if world is not None:
        world.open_refresh(ranks.holdings(entries, now), ranks.settings(now), step, device, refused)
        return world.layers({name: param for _, param, name, _ in entries})
    if refused is not None:
        raise refused
    layer_of = now.layer_key or (lambda name: name)
    return build_layers(
        Share(param, name, param.numel(), layer_of(name), group["isolate"])
        for group, param, name, _ in entries
    )
