"""Masks that a load in place has no room for: a state dict's groups hold them too.

``torch.distributed.checkpoint.load`` fills the tensors of a fresh optimizer's state dict, leaves behind what that lacks,
and refuses a checkpoint that lacks one of them; a broadcast from rank 0 does the former on the other ranks. A persistent
mask, and any mask with ``isolation_ratio=0``, is in some checkpoints and not in others. But a text they take over whole:
under a key that every checkpoint of ours has, the version of a group's form, such masks come along. Sharded parameters
need none of it: their dicts always have both masks.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from epi_kernels.distributed.shards import is_sharded
from epi_kernels.optim.masks import MASK_KEYS

STATE_VERSION = 1
VERSION_KEY = "isolation_version"

Masks = dict[str, Tensor]  # packed, by their keys in a state


def put_in_groups(
    saved_groups: Sequence[dict[str, Any]],
    param_groups: Sequence[Mapping[str, Any]],
    states: Mapping[Tensor, Mapping[str, Any]],
    *,
    template_has_masks: bool,
) -> None:
    """Of plain parameters that have such masks: the version becomes a text, with the masks by their places in the group.

    ``template_has_masks``: a fresh optimizer's state has an ``isolation_mask``.
    """
    keys = MASK_KEYS[1:] if template_has_masks else MASK_KEYS
    for saved, group in zip(saved_groups, param_groups, strict=True):
        masks = {}
        for place, param in enumerate(group["params"]):
            state = states.get(param, {})
            found = {key: _text(state[key]) for key in keys if key in state}
            if found and not is_sharded(param):
                masks[place] = found
        if masks:
            saved[VERSION_KEY] = json.dumps({"version": saved[VERSION_KEY], "masks": masks})


def version_and_masks(saved_group: Mapping[str, Any]) -> tuple[int, dict[int, Masks]]:
    """Of a saved group; the masks by their parameters' places in it.

    Raises:
        ValueError: a version that this release does not read, or masks that are none.
    """
    version, masks = saved_group.get(VERSION_KEY, STATE_VERSION), {}
    try:
        if isinstance(version, str):
            told = json.loads(version)
            version, masks = told["version"], told["masks"]
        if version == STATE_VERSION:
            masks = {int(place): _masks(found) for place, found in masks.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"the masks under {VERSION_KEY} of the state dict are damaged") from None
    if version != STATE_VERSION:
        raise ValueError(f"the state dict has {VERSION_KEY} {version!r}; this release reads {STATE_VERSION}")
    strangers = set(masks) - set(range(len(saved_group["params"])))
    if strangers:
        raise ValueError(
            f"the masks under {VERSION_KEY} are of parameters {strangers}, which their group lacks"
        )
    return version, masks


def left_behind(saved_groups: Sequence[Mapping[str, Any]], states: Mapping[Any, Any]) -> dict[Any, Masks]:
    """Of the masks in the groups those that the states lack, by the states' keys.

    Where the states have as many of a kind as the groups, they are taken at their word: who reorders unnamed parameters
    reorders the states, and no group's masks.
    """
    told = {
        group["params"][place]: masks
        for group in saved_groups
        for place, masks in version_and_masks(group)[1].items()
    }
    for kind in MASK_KEYS:
        own = {key for key, one in states.items() if one and kind in one and not is_sharded(one[kind])}
        of_kind = {key for key, masks in told.items() if kind in masks}
        for key in of_kind if len(own) >= len(of_kind) else of_kind & own:
            del told[key][kind]
    return {key: masks for key, masks in told.items() if masks}


def _text(mask: Tensor) -> str:
    return base64.b64encode(mask.cpu().numpy().tobytes()).decode("ascii")


def _masks(found: Mapping[str, str]) -> Masks:
    if not set(found) <= set(MASK_KEYS):
        raise ValueError(f"unknown masks {set(found)}")
    raw = {key: bytearray(base64.b64decode(text, validate=True)) for key, text in found.items()}
    return {key: torch.frombuffer(one, dtype=torch.uint8) for key, one in raw.items() if one}
