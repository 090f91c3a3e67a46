"""State of one parameter: created complete, packed masks, and state dicts taken whole or refused whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from epi_kernels.distributed.shards import local
from epi_kernels.optim import group_text
from epi_kernels.optim.arguments import (
    GLOBAL_OPTIONS,
    IsolationConfig,
    check_group_options,
    check_importance,
    shares_importance,
)
from epi_kernels.optim.compact import RUNS_KEY, change_whole, check_granularity, compacted
from epi_kernels.optim.corrections import CORRECTION_KEY, load_correction, new_correction
from epi_kernels.optim.group_masks import by_names, left_behind
from epi_kernels.optim.group_text import Masks
from epi_kernels.optim.masks import MASK_KEYS, load_mask, put_back_persistent, zero_mask
from epi_kernels.optim.moments import MOMENT_KEYS, SCALE_OF, load_moments, new_moment
from epi_kernels.optim.names import bare_name
from epi_kernels.optim.schedules import STEP_KEY, load_schedules
from epi_kernels.optim.sharded_state import localized
from epi_kernels.optim.states_told import AtHand, check_states, stepped_since, warn_of_lost_corrections
from epi_kernels.optim.step_counts import read_step


def complete_state(
    state: dict[str, Any], param: Tensor, group: Mapping[str, Any], config: IsolationConfig
) -> None:
    """Adds, zeroed, whatever a parameter's state lacks."""
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
    wanted = MOMENT_KEYS[:2] if shares_importance(group) else MOMENT_KEYS
    if RUNS_KEY in state and not all(key in state for key in wanted):
        state.update(
            change_whole(state, param, config, lambda whole: complete_state(whole, param, group, config))
        )
    for key in wanted:
        if key not in state:
            state.update(new_moment(key, param, config))
    if CORRECTION_KEY not in state:
        state.update(new_correction(param, config))
    if "isolation_mask" not in state and always_has_mask(config):
        state["isolation_mask"] = zero_mask(param, config)


def always_has_mask(config: IsolationConfig) -> bool:
    """A graph goes on with the mask that it was captured with."""
    return config.isolates or config.capturable


def load_param_state(
    saved: Mapping[str, Any],
    param: Tensor,
    group: Mapping[str, Any],
    config: IsolationConfig,
    name: str,
    left: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """One parameter's state: clones in our dtypes, checked against the parameter. ``left``: masks that ``saved`` lacks; there
    may be nothing else."""
    only_masks, left = not saved, left or {}
    given = {**saved, **left}
    saved = localized(given, param, f"state of {name}")
    known = {"step", *MOMENT_KEYS, *SCALE_OF.values(), CORRECTION_KEY, *MASK_KEYS}
    unknown = [key for key in saved if key not in known]
    if unknown:
        raise ValueError(
            f"state of {name} has keys this optimizer does not know: {', '.join(map(str, unknown))}"
        )
    state: dict[str, Any] = {}
    if not only_masks:
        missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in saved]
        if missing:
            raise ValueError(f"state of {name} lacks {', '.join(missing)}")
        state["step"] = read_step(saved["step"], f"state of {name}")
        own = "importance" in saved and not shares_importance(group)
        keys = MOMENT_KEYS if own else MOMENT_KEYS[:2]
        state.update(load_moments(saved, keys, param, config, f"state of {name}"))
        state.update(load_correction(saved, param, config, f"state of {name}"))
    for key in MASK_KEYS:
        if key in saved:
            state[key] = load_mask(saved[key], local(param), f"state of {name}, {key}", config)
    if "persistent_mask" in left:
        put_back_persistent(state, f"state of {name}")
    # a sharded state dict has both, in use or not; what p asks for comes back. Of a whole mask all ranks keep their parts
    for key in MASK_KEYS:
        if key in given and not bool(local(given[key]).any()):
            del state[key]
    if "persistent_mask" in state:  # it protects from the next step on, not from the next refresh
        state.setdefault("isolation_mask", zero_mask(param, config)).bitwise_or_(state["persistent_mask"])
    complete_state(state, param, group, config)
    if "persistent_mask" in state:
        check_granularity(state["persistent_mask"], param, config, f"state of {name}")
    return compacted(state, config)


def bytes_by_kind(states: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Bytes of these states, scales with what they scale; ``other`` are the step counters.

    ``weight_correction`` is listed where there is one.
    """
    kinds = [*MOMENT_KEYS, *MASK_KEYS]
    states = list(states)
    if any(CORRECTION_KEY in state for state in states):
        kinds.append(CORRECTION_KEY)
    kind_of = {key: key for key in kinds} | {scale: key for key, scale in SCALE_OF.items()}
    kind_of[RUNS_KEY] = "persistent_mask"  # what it is told by
    sizes: dict[str, int] = dict.fromkeys((*kinds, "other"), 0)
    for state in states:
        for key, value in state.items():
            if isinstance(value, Tensor):
                sizes[kind_of.get(key, "other")] += local(value).nbytes
    sizes["total"] = sum(sizes.values())
    return sizes


_OF_EVERY_GROUP = ("lr", "betas", "eps", "weight_decay")  # torch.optim.AdamW's have them as well


def _check_groups(ours: list[dict], saved: list[dict]) -> None:
    if len(ours) != len(saved):
        raise ValueError(f"state dict has {len(saved)} param groups, this optimizer {len(ours)}")
    for number, (group, saved_group) in enumerate(zip(ours, saved, strict=True)):
        if not isinstance(saved_group, Mapping) or "params" not in saved_group:
            raise ValueError(f"param group {number} of the state dict is no dict with 'params'")
        if len(group["params"]) != len(saved_group["params"]):
            raise ValueError(
                f"param group {number} of the state dict has {len(saved_group['params'])} parameters, "
                f"this optimizer's has {len(group['params'])}"
            )
        names, saved_names = group.get("param_names"), saved_group.get("param_names")
        if saved_names is not None and len(saved_names) != len(group["params"]):
            raise ValueError(
                f"param group {number} of the state dict has {len(saved_names)} names for {len(group['params'])} parameters: "
                "they were grouped otherwise when it was made (a flat dict gives a group what the first of its parameters "
                "had): give this optimizer the groups that it was of"
            )
        if names is None and saved_names is not None:  # ids that are names, of a model that has those
            ids = list(map(str, saved_group["params"]))
            names = ids if sorted(ids) == sorted(map(bare_name, saved_names)) else None
        if names is not None and saved_names is not None:
            for name, saved_name in zip(names, saved_names, strict=True):
                if bare_name(name) != bare_name(saved_name):
                    raise ValueError(
                        f"the state dict is of another parameter set: group {number} has {saved_name!r} "
                        f"where this optimizer has {name!r}"
                    )
        group_text.read(saved_group)
        lacking = [key for key in _OF_EVERY_GROUP if key not in saved_group]
        if lacking:
            raise ValueError(
                f"param group {number} of the state dict lacks {', '.join(lacking)}: it was cut off, or its parameters were "
                "grouped otherwise when it was made"
            )
        steps = saved_group.get(STEP_KEY, 0)
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"{STEP_KEY} must be an int >= 0, got {steps!r}")
        if saved_group.get("amsgrad"):
            raise ValueError("the state dict was saved with amsgrad=True, which is not supported")
        check_group_options(saved_group)


def _is_of_torch(saved_groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether they are torch.optim.AdamW's, which may have been ours before: it keeps what it does not know, T as it
    was among it, and adds options of its own that no group of ours has.

    ``torch.distributed.checkpoint.load`` into a dict of ours drops those, and T is then as AdamW got it. That states have
    taken more steps than T shows nothing: ``carry_importance`` makes such states, with any step and T at 0.
    """
    return any("amsgrad" in group for group in saved_groups)


def _load_group(group: dict[str, Any], saved: dict[str, Any], isolation_step: int) -> dict[str, Any]:
    left_out = {*GLOBAL_OPTIONS, group_text.VERSION_KEY}
    loaded = {key: deepcopy(value) for key, value in saved.items() if key not in left_out}
    for key, value in group.items():
        loaded.setdefault(key, value)
    loaded["params"] = group["params"]
    loaded[STEP_KEY] = isolation_step
    return loaded


def _at_hand(
    group: Mapping[str, Any],
    saved_group: Mapping[str, Any],
    states: Mapping[Any, Any],
    left: Mapping[Any, Masks],
) -> list[AtHand]:
    return [
        AtHand(str(key), param, group, states.get(key) or {}, left.get(key, {}))
        for param, key in zip(group["params"], saved_group["params"], strict=True)
    ]


def _without_gaps(entry: Any) -> Any:
    """torch puts {} where a flat dict lacks what the optimizer that loads has in a state."""
    if not isinstance(entry, Mapping):
        return entry
    return {key: value for key, value in entry.items() if not (isinstance(value, dict) and not value)}


def read_state_dict(
    state_dict: Mapping[str, Any],
    param_groups: list[dict[str, Any]],
    config: IsolationConfig,
    *,
    spent: bool = False,
) -> tuple[defaultdict[Tensor, Any], list[dict[str, Any]]]:
    """(state, param_groups) of a saved dict, ours or torch.optim.AdamW's; raises before anything changes.

    ``spent``: nobody needs the dict any more; each parameter's tensors are let go once they are read.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError("a state dict of an optimizer has the keys 'state' and 'param_groups'")
    saved_groups = state_dict["param_groups"]
    _check_groups(param_groups, saved_groups)
    states = {key: _without_gaps(entry) for key, entry in state_dict["state"].items()}
    steps = [group.get(STEP_KEY) for group in saved_groups]
    told = [group_text.read(group) for group in saved_groups]
    of_states = [one.states for one in told]
    named = by_names(chain.from_iterable(group["params"] for group in saved_groups))
    of_torch = _is_of_torch(saved_groups) or (named and stepped_since(of_states, states))
    if of_torch or None in steps:  # torch's AdamW counts per parameter only
        entries = states.items()
        isolation_step = max(
            (int(read_step(entry["step"], f"state {key}")) for key, entry in entries if "step" in entry),
            default=0,
        )
    else:
        isolation_step = max(map(int, steps), default=0)
    groups = [_load_group(g, s, isolation_step) for g, s in zip(param_groups, saved_groups, strict=True)]
    for group in groups:
        check_importance(group, config)
    load_schedules(groups, saved_groups, config)

    saved_ids = list(chain.from_iterable(group["params"] for group in saved_groups))
    owners = [(param, group, i) for group in groups for i, param in enumerate(group["params"])]
    owner_of = dict(zip(saved_ids, owners, strict=True))
    strangers = [key for key in states if key not in owner_of]
    if strangers:
        raise ValueError(f"the state dict holds state of parameters no group lists: {strangers[:5]}")
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    names = [
        name for group in param_groups for name in group.get("param_names", [None] * len(group["params"]))
    ]
    known = {key: (param, name) for key, (param, _, _), name in zip(saved_ids, owners, names, strict=True)}
    left = left_behind(saved_groups, told, states, known, of_torch=of_torch)
    if named and not of_torch:
        check_states(of_states, [_at_hand(g, s, states, left) for g, s in zip(groups, saved_groups)])
    for key in dict.fromkeys([*states, *left]):
        entry, masks = states.get(key), left.get(key)
        param, group, position = owner_of[key]
        name = group["param_names"][position] if "param_names" in group else f"parameter {key}"
        if entry or masks:
            state[param] = load_param_state(entry or {}, param, group, config, name, masks)
        for held in (entry, state_dict["state"].get(key)) if spent else ():
            if held:
                held.update(dict.fromkeys(held))
    saved = {owner_of[key][0]: entry for key, entry in states.items() if entry}
    warn_of_lost_corrections(
        [] if of_torch else of_states, saved.values(), [state[param] for param in saved], config
    )
    return state, groups
