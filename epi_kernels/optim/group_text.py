"""The version of a group's form in a state dict, ``isolation_version``: a number where the optimizer has no state, else a
JSON text that tells of its states too.

    {"version": 1,
     "group": [0, 2, 5],                             its number, how many there are, its parameters
     "masks": {"3": {"persistent_mask": "AQA="}},    packed, in base64, by their parameters' places in the group
     "owners": {"3": "layers.0.weight"},             whose they are; of one without a name: [shape, dtype, CRC-32] of exp_avg_sq
     "in_states": {"4": ["persistent_mask"]},        sharded parameters', which are in their states alone
     "states": {"parameters": 9, "step": 5, ...}}    of the whole optimizer: StatesTold

Earlier releases wrote less ("version" and "masks", at first): what is not told is not looked at.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epi_kernels.distributed.shards import is_sharded
from epi_kernels.optim.masks import MASK_KEYS
from epi_kernels.optim.states_told import StatesTold

STATE_VERSION = 1
VERSION_KEY = "isolation_version"
_SAMPLE = 4096  # elements: 16 KiB that a GPU hands over, whatever the parameter's size

Masks = dict[str, Tensor]  # packed, by their keys in a state


class Fingerprint(NamedTuple):
    """What tells a parameter without a name from others, as far as it goes: two that differ are two parameters' (or two
    states of one); two that are equal may be either's."""

    shape: tuple[int, ...]
    dtype: str
    crc: int

    @staticmethod
    def of(state: Mapping[str, Any]) -> Fingerprint | None:
        """Of ``exp_avg_sq`` as it is stored, some elements of it; None where there is none in one piece."""
        moment = state.get("exp_avg_sq")
        if not isinstance(moment, Tensor) or is_sharded(moment):
            return None
        if moment.layout != torch.strided or moment.is_meta:  # refused where states are read
            return None
        flat = moment.detach().reshape(-1)
        sample = flat[:: max(1, -(-flat.numel() // _SAMPLE))].cpu().contiguous()
        stored = sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b""
        return Fingerprint(tuple(moment.shape), str(moment.dtype), zlib.crc32(stored))


class GroupPlace(NamedTuple):
    """Where a group was when it was saved."""

    number: int
    n_groups: int
    n_params: int


@dataclass
class Told:
    """What a group tells; by places of parameters in it."""

    version: Any = STATE_VERSION
    group: GroupPlace | None = None
    masks: dict[int, Masks] = field(default_factory=dict)
    owners: dict[int, str | Fingerprint] = field(default_factory=dict)
    in_states: dict[int, list[str]] = field(default_factory=dict)
    states: StatesTold | None = None

    def text(self) -> str:
        return json.dumps(
            {
                "version": self.version,
                "group": self.group,
                "masks": {
                    place: {key: _text(mask) for key, mask in found.items()}
                    for place, found in self.masks.items()
                },
                "owners": self.owners,
                "in_states": self.in_states,
                "states": None if self.states is None else asdict(self.states),
            }
        )


def read(saved_group: Mapping[str, Any]) -> Told:
    """
    Raises:
        ValueError: a version that this release does not read, or a text that is none of ours.
    """
    version, told = saved_group.get(VERSION_KEY, STATE_VERSION), {}
    if isinstance(version, bool):  # True is 1
        raise ValueError(f"the state dict has {VERSION_KEY} {version!r}; this release reads {STATE_VERSION}")
    try:
        if isinstance(version, str):
            told = json.loads(version)
            version = told["version"]
        found = _parsed(told) if version == STATE_VERSION else Told(version)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise ValueError(f"the masks or states under {VERSION_KEY} of the state dict are damaged") from None
    if version != STATE_VERSION:
        raise ValueError(f"the state dict has {VERSION_KEY} {version!r}; this release reads {STATE_VERSION}")
    if found.group is None or found.group.n_params == len(saved_group["params"]):
        strangers = {*found.masks, *found.owners, *found.in_states} - set(range(len(saved_group["params"])))
        if strangers:
            raise ValueError(
                f"the masks under {VERSION_KEY} are of parameters {strangers}, which their group lacks"
            )
    return found


def _parsed(told: Mapping[str, Any]) -> Told:
    if not told:
        return Told()
    group, states = told.get("group"), told.get("states")
    return Told(
        group=None if group is None else GroupPlace(*map(int, group)),
        masks={int(place): _masks(found) for place, found in told["masks"].items()},
        owners={int(place): _owner(one) for place, one in told.get("owners", {}).items()},
        in_states={int(place): _kinds(found) for place, found in told.get("in_states", {}).items()},
        states=None if states is None else StatesTold.read(states),
    )


def _owner(one: Any) -> str | Fingerprint:
    if isinstance(one, str):
        return one
    shape, dtype, crc = one
    return Fingerprint(tuple(map(int, shape)), str(dtype), int(crc))


def _kinds(found: Any) -> list[str]:
    if not set(found) <= set(MASK_KEYS):
        raise ValueError(f"unknown masks {set(found)}")
    return list(found)


def _text(mask: Tensor) -> str:
    return base64.b64encode(mask.cpu().numpy().tobytes()).decode("ascii")


def _masks(found: Mapping[str, str]) -> Masks:
    _kinds(found)
    raw = {key: bytearray(base64.b64decode(text, validate=True)) for key, text in found.items()}
    return {key: torch.frombuffer(one, dtype=torch.uint8) for key, one in raw.items() if one}
