"""Compact states: moments and masks of what can move alone, where whole rows or blocks are isolated persistently.

A parameter whose persistent mask leaves few enough blocks of 64 elements to move has in its state, beside ``step``,

    stored_runs      int64 [r + 1, 2] on the host: first element and number of every run that has state; then (n, 0)
    exp_avg, ...     [elements stored], with their scales, and the packed masks: the runs end to end
    persistent_mask  where a run holds isolated elements too, whose block of 64 something movable is in

and nothing of what is in no run, which is isolated persistently. Whatever else reads states sees them whole, with zeros
there: state dicts above all. Nothing is lost on the way there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epi_kernels.distributed.shards import is_sharded, local
from epi_kernels.optim.arguments import IsolationConfig
from epi_kernels.optim.masks import MASK_KEYS
from epi_kernels.optim.moments import MOMENT_KEYS, SCALE_OF
from epi_kernels.optim.pages import zeros
from epi_kernels.reference import bits, codec
from epi_kernels.reference.runs import find_runs, pays, places, stored_elements

RUNS_KEY = "stored_runs"
BLOCK_ELEMENTS = 4096  # of isolation_granularity="block", row-major

# elements of a parameter that an entry of the tensor stands for
_ELEMENTS_OF = (
    dict.fromkeys(MOMENT_KEYS, 1)
    | dict.fromkeys(SCALE_OF.values(), codec.BLOCK)
    | dict.fromkeys(MASK_KEYS, 8)
)


def runs_of(state: Mapping[str, Any]) -> np.ndarray | None:
    """[r, 2] int64: first element and number of those that have state; None where all have."""
    return state[RUNS_KEY].cpu().numpy()[:-1] if RUNS_KEY in state else None  # somebody may have moved it


def state_shape(state: Mapping[str, Any], param: Tensor) -> torch.Size:
    """Of the moments, as their parameter is now; one that no moment has where the runs are of another parameter."""
    runs = state.get(RUNS_KEY)
    if runs is None:
        return param.shape
    fits = isinstance(runs, Tensor) and runs.ndim == 2 and int(runs[-1, 0]) == param.numel()
    return torch.Size([int(runs[:, 1].sum()) if fits else -1])


def unit_elements(param: Tensor, granularity: str) -> int:
    """Elements of a row, or of a block, of which the last may be shorter."""
    if granularity == "block":
        return BLOCK_ELEMENTS
    return param.numel() // max(param.shape[0], 1) if param.ndim else 1


def check_granularity(mask: Tensor, param: Tensor, config: IsolationConfig, what: str) -> None:
    """Refuses persistent masks that are not of whole rows or blocks, where such were asked for. ``mask``: bool of
    ``param``'s shape, or packed.

    Raises:
        NotImplementedError: the parameter is sharded.
        ValueError: a row or block is isolated in part.
    """
    kind = config.isolation_granularity
    if kind == "element":
        return
    if is_sharded(param):
        raise NotImplementedError(
            f"{what}: a DTensor (FSDP2, tensor parallelism) has no persistent mask with isolation_granularity={kind!r}: "
            "use isolation_granularity='element'"
        )
    n, size = param.numel(), unit_elements(param, kind)
    if n == 0 or size == 1:
        return
    flat = bits.unpack(mask, n) if mask.dtype == torch.uint8 else mask.reshape(-1)
    whole = n // size * size
    units = [part for part in (flat[:whole].view(-1, size), flat[whole:].view(1, -1)) if part.numel()]
    if any(bool((unit != unit[:, :1]).any()) for unit in units):
        unit = f"blocks of {size:,} elements" if kind == "block" else f"rows ({size:,} elements each)"
        raise ValueError(
            f"{what}: a persistent mask with isolation_granularity={kind!r} is of whole {unit}, and this one isolates some "
            "in part: use isolation_granularity='element', or complete them"
        )


def compacted(state: dict[str, Any], config: IsolationConfig) -> dict[str, Any]:
    """A whole state without what its persistent mask isolates, where that pays; else ``state`` itself.

    The mask has passed ``check_granularity``.
    """
    lasting = state.get("persistent_mask")
    if config.isolation_granularity == "element" or lasting is None:
        return state
    n = local(state["exp_avg"]).numel()
    runs = find_runs(lasting, n)
    if not pays(stored_elements(runs), len(runs), n):
        return state
    found: dict[str, Any] = {}
    for key, value in state.items():
        if key not in _ELEMENTS_OF:
            found[key] = value
            continue
        parts = [value.reshape(-1)[part] for part in _slices(runs, runs[:, 0], _ELEMENTS_OF[key])]
        found[key] = zeros((sum(map(len, parts)),), value.dtype, value.device)
        if parts:
            torch.cat(parts, out=found[key])
    if not bool(found["persistent_mask"].any()):
        del found["persistent_mask"]
    found[RUNS_KEY] = torch.from_numpy(np.concatenate([runs, [[n, 0]]]))
    return found


def expanded(state: dict[str, Any], param: Tensor, device: torch.device | None = None) -> dict[str, Any]:
    """The whole state of a compact one, zeros where there was none; a whole one as it is. Moments and masks lie on
    ``device``, if it is given."""
    runs = runs_of(state)
    if runs is None:
        return state
    found = {key: value for key, value in state.items() if key not in (*MASK_KEYS, RUNS_KEY)}
    for key in _ELEMENTS_OF.keys() & found.keys():
        shape = param.shape if key in MOMENT_KEYS else (-(-param.numel() // _ELEMENTS_OF[key]),)
        whole = zeros(shape, found[key].dtype, device or found[key].device)
        found[key] = _put(found[key], whole, runs, _ELEMENTS_OF[key])
    masks = whole_masks(state, param)
    return found | {key: mask.to(device or mask.device) for key, mask in masks.items()}


def whole_masks(state: Mapping[str, Any], param: Tensor) -> dict[str, Tensor]:
    """The packed masks of what of the parameter lies on this rank; copies where the state is compact."""
    runs = runs_of(state)
    if runs is None:
        return {key: state[key] for key in MASK_KEYS if key in state}
    stored = state["isolation_mask"]
    ones = torch.full((bits.packed_bytes(param.numel()),), 0xFF, dtype=torch.uint8, device=stored.device)
    if param.numel() % 8:
        ones[-1] >>= -param.numel() % 8
    parts = {
        "isolation_mask": stored,
        "persistent_mask": state.get("persistent_mask", torch.zeros_like(stored)),
    }
    return {key: _put(part, ones.clone(), runs, 8) for key, part in parts.items()}


def has_persistent_mask(state: Mapping[str, Any]) -> bool:
    return "persistent_mask" in state or RUNS_KEY in state


def change_whole(
    state: dict[str, Any], param: Tensor, config: IsolationConfig, change: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """A state after a change that knows nothing of compact ones: what has state before and after keeps its values, what has
    none before begins with zeros."""
    whole = expanded(state, param)
    change(whole)
    return compacted(whole, config)


def expand_states(
    saved: MutableMapping[Any, dict[str, Any]], params: Sequence[Tensor]
) -> dict[Tensor, dict[str, Any]]:
    """Makes the states of a state dict whole, by the numbers that ``params`` have there; returns those that were not. They
    are made for the dict, and lie in host memory: that of the device may have no room."""
    made = {}
    for number, param in enumerate(params):
        if RUNS_KEY in saved.get(number, {}):
            saved[number] = made[param] = expanded(saved[number], param, torch.device("cpu"))
    return made


def _slices(runs: np.ndarray, begins: np.ndarray, elements: int) -> list[slice]:
    """Where the runs lie in a tensor with one entry for so many elements, if they begin at ``begins``."""
    ends = -(-(begins + runs[:, 1]) // elements)
    return [
        slice(begin, end) for begin, end in zip((begins // elements).tolist(), ends.tolist(), strict=True)
    ]


def _put(stored: Tensor, whole: Tensor, runs: np.ndarray, elements: int) -> Tensor:
    """``stored``, the runs end to end, into their places."""
    flat, stored = whole.view(-1), stored.to(whole.device)
    into, of = _slices(runs, runs[:, 0], elements), _slices(runs, places(runs), elements)
    for target, source in zip(into, of, strict=True):
        flat[target] = stored[source]
    return whole
