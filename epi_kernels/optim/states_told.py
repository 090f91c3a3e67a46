"""What a group's text tells of its optimizer's states, and whether the states at hand are those.

``torch.distributed.checkpoint.load`` copies into the tensors that the dict of the loading optimizer holds, whatever their
dtype, and drops what that has no tensor for: codes of 8 bits become floats of another meaning, an own importance, a mask or
a whole state (a frozen parameter's) is gone, and nothing says so. A text goes through whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from epi_kernels.distributed.shards import any_sharded, is_sharded
from epi_kernels.optim.arguments import INT4, INT8, IsolationConfig, shares_importance
from epi_kernels.optim.corrections import CORRECTION_KEY
from epi_kernels.optim.moments import MOMENT_KEYS, SCALE_OF
from epi_kernels.optim.report import callers_level
from epi_kernels.optim.sharded_state import OURS
from epi_kernels.optim.step_counts import read_step
from epi_kernels.reference import codec, master, nibbles

_BITS_OF_CODES = {INT8: 8, INT4: 4}
_BITS_OF = {dtype: bits for bits, dtype in master.CORRECTION_DTYPES.items()}


@dataclass(frozen=True)
class StatesTold:
    """Of a whole optimizer: the same in the texts of all its groups, and on all ranks."""

    parameters: int
    used: int  # with a state that is not as new
    own: int  # with an importance of their own
    masked: int  # with an isolation mask that has bits; of sharded ones, with a mask
    by_group: int  # with masks that a group's text has or tells of
    step: int  # the largest
    state_bits: int  # of the moments' codes; 0 where they are floats
    importance_bits: int
    master_weight_bits: int

    @staticmethod
    def of(
        param_groups: Sequence[Mapping[str, Any]],
        states: Mapping[Tensor, Mapping[str, Any]],
        config: IsolationConfig,
        by_group: int,
    ) -> StatesTold:
        params = [param for group in param_groups for param in group["params"]]
        found = [states.get(param) or {} for param in params]
        stepped = [state for state in found if state]
        steps = _on_host([state["step"] for state in stepped])
        with_own = [
            param for group in param_groups if not shares_importance(group) for param in group["params"]
        ]
        sharded = [is_sharded(param) for param in params] if any_sharded(params) else [False] * len(params)
        masks = [
            (state["isolation_mask"], cut)
            for state, cut in zip(found, sharded, strict=True)
            if "isolation_mask" in state
        ]
        return StatesTold(
            parameters=len(params),
            used=sum(step > 0 or _has_carried(state) for step, state in zip(steps, stepped, strict=True)),
            own=sum("importance" in (states.get(param) or {}) for param in with_own),
            masked=sum(cut for _, cut in masks)
            + sum(_on_host([mask.any() for mask, cut in masks if not cut])),
            by_group=by_group,
            step=int(max(steps, default=0)),
            state_bits=_BITS_OF_CODES.get(config.state_dtype, 0),
            importance_bits=_BITS_OF_CODES.get(config.importance_dtype, 0),
            master_weight_bits=config.master_weight_bits,
        )

    @staticmethod
    def read(told: Mapping[str, Any]) -> StatesTold:
        """Of a text. What a later release adds is not looked at."""
        return StatesTold(**{field.name: int(told[field.name]) for field in fields(StatesTold)})


def _on_host(values: Sequence[Tensor]) -> list[Any]:
    """Of tensors of one element, in their order; one transfer a device."""
    if len({value.device for value in values}) == 1:
        return torch.stack(list(values)).tolist()
    places: dict[torch.device, list[int]] = {}
    for place, value in enumerate(values):
        places.setdefault(value.device, []).append(place)
    found: list[Any] = [None] * len(values)
    for held in places.values():
        for place, value in zip(held, torch.stack([values[one] for one in held]).tolist(), strict=True):
            found[place] = value
    return found


def _has_carried(state: Mapping[str, Any]) -> bool:
    """Whether a state that took no step has an importance of its own; the same on all ranks."""
    own = state.get("importance")
    return isinstance(own, Tensor) and (is_sharded(own) or bool(own.any()))


def _step(state: Mapping[str, Any]) -> int:
    return int(read_step(state["step"], "a state")) if "step" in state else 0


def stepped_since(told: Sequence[StatesTold | None], states: Mapping[Any, Any]) -> bool:
    """Whether another optimizer has taken steps after the texts were written; it keeps them as they are.

    Warns: what it was not given is lost.
    """
    known = [one.step for one in told if one is not None]
    last = max(map(_step, filter(None, states.values())), default=0)
    if not known or last <= max(known):
        return False
    warnings.warn(
        f"another optimizer has taken these states from step {max(known)} to step {last}: T becomes {last}, and of the masks only "
        "those in the states are taken",
        stacklevel=callers_level(),
    )
    return True


def warn_of_lost_corrections(
    told: Sequence[StatesTold | None],
    saved: Iterable[Mapping[str, Any]],
    loaded: Iterable[Mapping[str, Any]],
    config: IsolationConfig,
) -> None:
    """Of weights, which come as they are stored then. ``saved``, ``loaded``: a parameter's states; ``told``: where a load in
    place may have left corrections behind."""
    gone = any(
        CORRECTION_KEY in one and CORRECTION_KEY not in ours for one, ours in zip(saved, loaded, strict=True)
    )
    bits = max((one.master_weight_bits for one in told if one is not None), default=16)
    if gone or (bits > 16 and config.master_weight_bits == 16):
        were = f"master_weight_bits={bits}" if bits > 16 else "master_weight_bits"
        warnings.warn(
            f"the weights' corrections of this state dict ({were}) are dropped, for this optimizer or its weights keep none: "
            "the weights go on as they are stored. To keep them give it the same master_weight_bits",
            stacklevel=callers_level(),
        )


@dataclass(frozen=True)
class AtHand:
    """A parameter and its state in the dict that is loaded."""

    name: str
    param: Tensor
    group: Mapping[str, Any]  # as loaded
    state: Mapping[str, Any]
    masks: Mapping[str, Tensor]  # that its group's text had


def check_states(told: Sequence[StatesTold | None], found: Sequence[Sequence[AtHand]]) -> None:
    """By groups.

    Raises:
        ValueError: the states are not those that were saved.
    """
    for one, group in zip(told, found, strict=True):
        if one is not None:
            for each in group:
                _check_kinds(one, each)
    every, first = [each for group in found for each in group], told[0] if told else None
    if first is None or any(one != first for one in told):
        return
    with_own = [each for each in every if each.state and not shares_importance(each.group)]
    _check_kept("own importances", first.own, with_own, lambda each: "importance" in each.state)
    if first.parameters != len(every):  # torch gives a group the text of its first parameter's stage
        warnings.warn(
            f"these groups tell of {first.parameters} parameters, as of a stage of a pipeline that was cut otherwise, and this "
            f"optimizer has {len(every)}: masks that other stages had in their groups (persistent ones), if any, are not here. To "
            "keep them load into stages cut as those were",
            stacklevel=callers_level(),
        )
        return
    _check_kept("states", first.used, every, lambda each: _step(each.state) > 0 or "importance" in each.state)
    _check_kept(
        "isolation masks",
        first.masked,
        every,
        lambda each: "isolation_mask" in each.state or "isolation_mask" in each.masks,
    )


def _check_kept(what: str, n_saved: int, found: Sequence[AtHand], has: Callable[[AtHand], bool]) -> None:
    lack = [each.name for each in found if not has(each)]
    if lack and len(found) - len(lack) < n_saved:
        some = ", ".join(lack[:3]) + (f" and {len(lack) - 3} more" if len(lack) > 3 else "")
        raise ValueError(
            f"the state dict was saved with {n_saved} {what} and has {len(found) - len(lack)} now ({some}: none): {_WHY}"
        )


def _check_kinds(told: StatesTold, here: AtHand) -> None:
    for key in MOMENT_KEYS:
        value = here.state.get(key)
        if not isinstance(value, Tensor):
            continue
        bits = _code_bits(value, here.state.get(SCALE_OF[key]))
        saved = told.importance_bits if key == "importance" else told.state_bits
        # tensors too small for blocks are floats in any case
        if bits != saved and (bits or here.param.numel() >= codec.MIN_ELEMENTS):
            what = f"{saved}-bit codes" if saved else "floats"
            _refuse_kind(here.name, key, what, f"{bits}-bit codes" if bits else str(value.dtype))
    correction = here.state.get(CORRECTION_KEY)
    if not isinstance(correction, Tensor):
        return
    bits = _BITS_OF.get(correction.dtype)
    if bits is not None and told.master_weight_bits in (24, 32) and bits != told.master_weight_bits:
        what = f"the correction of master_weight_bits={told.master_weight_bits}"
        _refuse_kind(here.name, CORRECTION_KEY, what, str(correction.dtype))


def _code_bits(value: Tensor, scales: Any) -> int:
    """Of the codes that a moment in a state dict is; 0 of floats."""
    if value.dtype != INT8:
        return 0
    return 4 if isinstance(scales, Tensor) and scales.dtype == nibbles.SCALE_DTYPE else 8


def _refuse_kind(name: str, key: str, saved: str, came: str) -> None:
    raise ValueError(f"{key} of {name} was saved as {saved}, and came as {came}: {_WHY}")


_WHY = (
    "torch.distributed.checkpoint.load fills what the dict of the optimizer that loads has room for, as if it were alike. Use "
    f"{OURS}, or give that optimizer the options of the one that was saved, and freeze parameters after the load"
)
