"""Importance carried from one training stage to the next. Importance that restarts cold protects nothing."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epi_kernels.distributed.shards import local
from epi_kernels.optim.arguments import IsolationConfig, shares_importance
from epi_kernels.optim.compact import compacted, whole_masks
from epi_kernels.optim.corrections import CORRECTION_KEY, load_correction
from epi_kernels.optim.entries import Entry
from epi_kernels.optim.moments import read_moment, write_moment
from epi_kernels.optim.names import bare_name
from epi_kernels.optim.sharded_state import localized
from epi_kernels.optim.state import complete_state
from epi_kernels.optim.step_counts import read_step


@dataclass(frozen=True)
class Carried:
    """What one parameter takes over: its importance, the step it was collected up to, and what belongs to the weight.

    ``source``: the parameter's state there, for the correction of a weight that is still the same; ``key``: which
    moment of it served as the importance.
    """

    importance: Tensor
    step: Tensor
    source: Mapping[str, Any]
    key: str


class _Source(NamedTuple):
    """One parameter's state in the source, and the group it is in."""

    entry: Mapping[str, Any]
    group: Mapping[str, Any]


def _entries(source: Any) -> tuple[list[str] | None, list[_Source]]:
    """(names or None, states in order) of an optimizer or its state dict."""
    state_dict = source
    if isinstance(source, torch.optim.Optimizer):
        state_dict = getattr(source, "_state_dict_as_it_is", source.state_dict)()
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise TypeError(
            "carry_importance takes a MaskedEMAAdamW or torch.optim.AdamW, or the state_dict of one, "
            f"got {type(source).__name__}"
        )
    groups = state_dict["param_groups"]
    entries = [
        _Source(state_dict["state"].get(key) or {}, group) for group in groups for key in group["params"]
    ]
    if all("param_names" in group for group in groups):
        return [name for group in groups for name in group["param_names"]], entries
    return None, entries


def _take(source: _Source, param: Tensor, name: str) -> Carried | None:
    what = f"the source's state of {name}"
    if not source.entry:
        return None  # the source never stepped it: its importance is 0
    entry = localized(source.entry, param, what)
    # a group that came to share its importance has an old one of its own lying about
    shared = "importance" not in entry or (
        "importance_beta" in source.group and shares_importance(source.group)
    )
    key = "exp_avg_sq" if shared else "importance"
    if key not in entry:
        raise ValueError(f"{what} has neither importance nor exp_avg_sq")
    importance = read_moment(entry, key, local(param).shape, what)
    return Carried(importance, read_step(entry.get("step", 0.0), what), entry, key)


def match_source(source: Any, params: list[Tensor], names: list[str] | None) -> list[Carried | None]:
    """What each of ``params`` takes over: by name where both sides have names, else by position.

    Raises before anything changes when a parameter has no counterpart or its shape differs.
    """
    source_names, entries = _entries(source)
    if names is not None and source_names is not None:
        by_name = {bare_name(name): entry for name, entry in zip(source_names, entries, strict=True)}
        missing = [name for name in names if bare_name(name) not in by_name]
        if missing:
            raise ValueError(
                f"the source has no parameter named {', '.join(missing[:5])} ({len(missing)} missing)"
            )
        matched = [by_name[bare_name(name)] for name in names]
    else:
        if len(entries) != len(params):
            raise ValueError(
                f"the source has {len(entries)} parameters, this optimizer {len(params)}, without names"
            )
        matched = entries
    if not any(source.entry for source in matched):
        raise ValueError("the source carries no importance: it has no state for any of these parameters")
    labels = names if names is not None else [f"param_{i}" for i in range(len(params))]
    return [_take(found, param, label) for found, param, label in zip(matched, params, labels, strict=True)]


def fresh_states(
    entries: Sequence[Entry],
    carried: Sequence[Carried | None],
    state_of: Mapping[Tensor, Mapping[str, Any]],
    config: IsolationConfig,
) -> list[dict[str, Any]]:
    """States to start a stage from: carried importance, masks as they are, exp_avg zero.

    A weight's correction is ours as it is, else the source's: the weights go on, and their low bits with them.

    Raises:
        ValueError: the source's correction of a weight does not fit it; nothing has changed.
    """
    fresh = []
    for (group, param, name, _), taken in zip(entries, carried, strict=True):
        old = state_of.get(param, {})
        state: dict[str, Any] = dict(whole_masks(old, param))
        if CORRECTION_KEY in old:
            state[CORRECTION_KEY] = old[CORRECTION_KEY]
        if taken is not None and CORRECTION_KEY not in state:
            state.update(load_correction(taken.source, param, config, f"the source's state of {name}"))
        if taken is not None or state:
            complete_state(state, param, group, config)
        if taken is not None:
            shared = shares_importance(group)
            write_moment(state, "exp_avg_sq" if shared else "importance", taken.importance)
            if shared:
                state["step"].copy_(taken.step)
        fresh.append(compacted(state, config))
    return fresh


def put_states(
    entries: Sequence[Entry],
    fresh: Sequence[dict[str, Any]],
    state_of: MutableMapping[Tensor, dict[str, Any]],
) -> None:
    """In place of what was there; a parameter whose fresh state is empty has none."""
    for entry, state in zip(entries, fresh, strict=True):
        if state:
            state_of[entry.param] = state
        else:
            state_of.pop(entry.param, None)
