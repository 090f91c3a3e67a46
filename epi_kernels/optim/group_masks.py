"""Masks that a load in place has no room for: a state dict's groups hold them too, or say that its states do.

``torch.distributed.checkpoint.load`` fills the tensors of a fresh optimizer's state dict, leaves behind what that lacks,
and refuses a checkpoint that lacks one of them; a broadcast from rank 0 does the former on the other ranks. A persistent
mask, and any mask with ``isolation_ratio=0``, is in some checkpoints and not in others. But a text they take over whole:
under a key that every checkpoint of ours has, the version of a group's form, such masks of plain parameters come along.
Those of sharded parameters lie on many ranks; the text says that the states have them, and a load that has lost them is
refused.

Whoever asks for a state dict asks for it in the same way: that it will go through such a load shows only where it
comes back, by names for the numbers of its parameters. So the masks are in the groups of every state dict of a plain
optimizer that has some, a sixth of a byte a parameter (with flatten_optimizer_state_dict torch repeats what a group
has for each of its parameters), and one that is loaded by numbers is taken at its states' word.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from epi_kernels.distributed.shards import is_sharded
from epi_kernels.optim.arguments import IsolationConfig
from epi_kernels.optim.group_text import VERSION_KEY, Fingerprint, GroupPlace, Masks, Told
from epi_kernels.optim.masks import MASK_KEYS
from epi_kernels.optim.names import bare_name
from epi_kernels.optim.report import callers_level
from epi_kernels.optim.sharded_state import OURS
from epi_kernels.optim.states_told import StatesTold


def put_in_groups(
    saved_groups: Sequence[dict[str, Any]],
    param_groups: Sequence[Mapping[str, Any]],
    states: Mapping[Tensor, Mapping[str, Any]],
    *,
    config: IsolationConfig,
    template_has_masks: bool,
) -> None:
    """Where some parameter has a state the version of every group becomes a text, of such masks and of the states.

    ``template_has_masks``: a fresh optimizer's state has an ``isolation_mask``.
    """
    if not any(states.values()):
        return
    keys = MASK_KEYS[1:] if template_has_masks else MASK_KEYS
    told = [_told(group, states, keys) for group in param_groups]
    by_group = sum(len(one.masks) + len(one.in_states) for one in told)
    of_states = StatesTold.of(param_groups, states, config, by_group)
    for number, (saved, one) in enumerate(zip(saved_groups, told, strict=True)):
        one.group, one.states = GroupPlace(number, len(told), len(saved["params"])), of_states
        saved[VERSION_KEY] = one.text()


def _told(group: Mapping[str, Any], states: Mapping[Tensor, Mapping[str, Any]], keys: Sequence[str]) -> Told:
    told, names = Told(), group.get("param_names")
    for place, param in enumerate(group["params"]):
        state = states.get(param, {})
        found = {key: state[key] for key in keys if key in state}
        if found and is_sharded(param):
            told.in_states[place] = list(found)
        elif found:
            told.masks[place] = found
            owner = Fingerprint.of(state) if names is None else names[place]
            if owner is not None:
                told.owners[place] = owner
    return told


def left_behind(
    saved_groups: Sequence[Mapping[str, Any]],
    told: Sequence[Told],
    states: Mapping[Any, Any],
    params: Mapping[Any, tuple[Tensor, str | None]],
    *,
    of_torch: bool,
) -> dict[Any, Masks]:
    """Of the masks in the groups those that the states have lost, by the states' keys.

    One whose parameter has changed places is not lost: who reorders unnamed parameters reorders the states, and no group's
    masks.

    Args:
        told: of the groups.
        params: this optimizer's, with their names where they have some, by the states' keys.
        of_torch: the states are torch.optim.AdamW's, which has no masks to lose.

    Raises:
        ValueError: the groups are others, the states have lost masks that they alone had, or a mask cannot be told to be
            its parameter's.
    """
    if of_torch or not by_names(params):
        _warn_of_removed(saved_groups, told, states)
        return {}
    _check_grouping(saved_groups, told)
    _check_in_states(saved_groups, told, states)
    here = _Here(params, states)
    masks: dict[Any, Masks] = {}
    owners: dict[Any, str | Fingerprint] = {}
    for group, one in zip(saved_groups, told, strict=True):
        masks |= {group["params"][place]: dict(found) for place, found in one.masks.items()}
        owners |= {group["params"][place]: owner for place, owner in one.owners.items()}
    for kind in MASK_KEYS:
        own = {
            key: one[kind] for key, one in states.items() if one and kind in one and not is_sharded(one[kind])
        }
        moved = own.keys() - {key for key, found in masks.items() if kind in found}
        for key in [key for key, found in masks.items() if kind in found]:
            mask, owner = masks[key][kind], owners.get(key)
            if key in own or any(
                _equal(own[other], mask) and (owner is None or here.may_be(owner, other)) for other in moved
            ):
                del masks[key][kind]
    masks = {key: found for key, found in masks.items() if found}
    for key, owner in owners.items():
        if key in masks:
            _check_owner(key, owner, masks, here)
    return masks


def by_names(keys: Iterable[Any]) -> bool:
    """Whether a state dict has been through torch's calls, which put names for the numbers of parameters."""
    return any(isinstance(key, str) for key in keys)


def _lost(
    saved_groups: Sequence[Mapping[str, Any]], told: Sequence[Told], states: Mapping[Any, Any], what: str
) -> list[str]:
    """Masks that groups tell of and states lack, in words; ``what``: "masks" or "in_states"."""
    return [
        f"{kind} of {group['params'][place]}"
        for group, one in zip(saved_groups, told, strict=True)
        for place, kinds in getattr(one, what).items()
        if place < len(group["params"])
        for kind in kinds
        if kind not in (states.get(group["params"][place]) or {})
    ]


def _warn_of_removed(
    saved_groups: Sequence[Mapping[str, Any]], told: Sequence[Told], states: Mapping[Any, Any]
) -> None:
    removed = [one for what in ("masks", "in_states") for one in _lost(saved_groups, told, states, what)]
    if removed:
        warnings.warn(
            f"the states of this state dict lack masks that they had when it was made ({_some(removed)}): they are taken as "
            "removed, and isolate nothing",
            stacklevel=callers_level(),
        )


def _check_grouping(saved_groups: Sequence[Mapping[str, Any]], told: Sequence[Told]) -> None:
    if not any(one.group and (one.states is None or one.states.by_group) for one in told):
        return
    here = [(len(saved_groups), len(group["params"])) for group in saved_groups]
    there = [one.group and (one.group.n_groups, one.group.n_params) for one in told]
    numbers = {one.group.number for one in told if one.group}
    if here != there or len(numbers) != len(told):
        raise ValueError(
            "the parameters were grouped otherwise when this state dict was made, whose masks go by group: give this optimizer "
            f"the groups that it was of; here their sizes are {[len(group['params']) for group in saved_groups]}"
        )


def _check_in_states(
    saved_groups: Sequence[Mapping[str, Any]], told: Sequence[Told], states: Mapping[Any, Any]
) -> None:
    lost = _lost(saved_groups, told, states, "in_states")
    if lost:
        raise ValueError(
            f"the states were saved with masks of sharded parameters that this load has left behind ({_some(lost)}): a fresh "
            f"optimizer's dict has no room for them. Use {OURS}, or the full state dict on every rank "
            "(StateDictOptions(full_state_dict=True), without broadcast_from_rank0)"
        )


def _check_owner(
    key: Any,
    owner: str | Fingerprint,
    masks: Mapping[Any, Masks],
    here: _Here,
) -> None:
    """Refuses a mask that is another parameter's, or may be."""
    name = here.names[key]
    may_be = here.all_that_may_be(owner)
    if key not in may_be:
        whose = owner if isinstance(owner, str) else "another parameter"
        raise ValueError(
            f"a mask of {whose} would come to {name}: give this optimizer its parameters in the order of the one that was "
            "saved, or make that one with names (model.named_parameters())"
        )
    alike = [here.names[other] for other in may_be if not _same(masks.get(other, {}), masks[key])]
    if alike:
        raise ValueError(
            f"whether masks are of {name} or of {_some(alike)} cannot be told: of parameters without names they go by "
            f"shape and exp_avg_sq. Make the optimizer that saves with names (model.named_parameters()), or use {OURS}"
        )


class _Here:
    """What tells the parameters at hand apart, read once of each: there may be thousands."""

    def __init__(self, params: Mapping[Any, tuple[Tensor, str | None]], states: Mapping[Any, Any]) -> None:
        self._states = states
        # where this optimizer's parameters have no names, the model's
        self.names = {key: str(key) if name is None else name for key, (_, name) in params.items()}
        self._bare = {key: bare_name(name) for key, name in self.names.items()}
        self._shapes = {key: tuple(param.shape) for key, (param, _) in params.items()}
        self._alike: dict[str | tuple[int, ...], list[Any]] = {}  # keys by bare name, and by shape
        for key in params:
            self._alike.setdefault(self._bare[key], []).append(key)
            self._alike.setdefault(self._shapes[key], []).append(key)
        self._fingerprints: dict[Any, Fingerprint | None] = {}

    def may_be(self, owner: str | Fingerprint, key: Any) -> bool:
        """Whether nothing says that a parameter is another one. A state that came to another dtype says nothing."""
        if isinstance(owner, str):
            return self._bare[key] == bare_name(owner)
        if self._shapes[key] != owner.shape:
            return False
        if key not in self._fingerprints:
            self._fingerprints[key] = Fingerprint.of(self._states.get(key) or {})
        here = self._fingerprints[key]
        return here is None or here.dtype != owner.dtype or here.crc == owner.crc

    def all_that_may_be(self, owner: str | Fingerprint) -> list[Any]:
        same = self._alike.get(bare_name(owner) if isinstance(owner, str) else owner.shape, [])
        return [key for key in same if self.may_be(owner, key)]


def _same(one: Masks, other: Masks) -> bool:
    return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)


def _equal(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.dtype == other.dtype and torch.equal(one.cpu(), other)


def _some(words: Sequence[Any]) -> str:
    return ", ".join(map(str, words[:3])) + (f" and {len(words) - 3} more" if len(words) > 3 else "")
