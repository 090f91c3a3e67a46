"""The configurations that a planner weighs up, and what each takes of a card, of the host and of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from epi_kernels import footprint
from epi_kernels.optim.offload.pipeline import STAGING_BYTES
from epi_kernels.planner.machine import GB, Machine

RESERVED = 10**9  # bytes: the CUDA context, and what the allocator cannot use
UNROUNDED = "PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:1"
SAME_TIME = 1.25  # steps that differ by less are called equally fast, and exactness decides


@dataclass(frozen=True)
class Configuration:
    """How a model of bfloat16 weights trains. From the most exact to the smallest, as ``CONFIGURATIONS`` lists them."""

    name: str
    options: dict[str, Any]  # of MaskedEMAAdamW
    checkpointing: bool = False  # activations are computed again in the backward pass
    release: bool = False  # gradients are freed as they are used: no clipping by the norm of all of them

    @property
    def offloaded(self) -> bool:
        return "offload" in self.options


EXACT: dict[str, Any] = {"master_weight_bits": 32}
STATES: list[tuple[str, dict[str, Any]]] = [
    ("32-bit weights, bfloat16 states", EXACT),
    ("24-bit weights, 8-bit states", {"state_dtype": "int8", "master_weight_bits": 24}),
    ("bfloat16 weights, 8-bit states", {"state_dtype": "int8"}),
    ("bfloat16 weights, 4-bit states", {"state_dtype": "int4"}),
    (
        "states on the host: 32-bit weights, float32 states",
        EXACT | {"state_dtype": torch.float32, "offload": "cpu"},
    ),
    (
        "states on the host: 24-bit weights, 8-bit states",
        {"state_dtype": "int8", "master_weight_bits": 24, "offload": "cpu"},
    ),
]
CONFIGURATIONS = [
    Configuration(name, options, checkpointing, release)
    for name, options in STATES
    for checkpointing, release in ((False, False), (True, False), (False, True), (True, True))
    if release or "offload" not in options
]


@dataclass(frozen=True)
class Job:
    """What is to be trained on: a card of so many GB, steps of so many passes over so many sequences of so many tokens."""

    card_gb: float
    batch: int
    length: int
    accumulation: int = 1  # gradients stay from pass to pass where there are more, released or not
    # of every configuration's states: ``footprint.tensors``
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def card_bytes(self) -> int:
        return int(self.card_gb * GB)

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def nothing_fits(self) -> str:
        return (
            f"Nothing fits: give a larger card, a smaller --max-length (now {self.length:,}) or --batch-size "
            f"(now {self.batch}), "
            + (
                f"no accumulation (now {self.accumulation}, which keeps gradients), "
                if self.accumulation > 1
                else ""
            )
            + "or shard the model (fully_shard)."
        )

    def allows(self, one: Configuration) -> bool:
        """4-bit states have no importance of their own."""
        own = footprint.tensors(0, torch.bfloat16, **self.options)["importance"]
        return not (own and one.options.get("state_dtype") == "int4")


PeakOf = Callable[
    [bool, bool], int
]  # (checkpointing, release): bytes that the passes hold at most, weights included


@dataclass(frozen=True)
class Plan:
    """Bytes of a card and of the host, and seconds of a step, of one configuration."""

    configuration: Configuration
    device_bytes: int
    left_bytes: int  # of the card
    host_bytes: int = 0
    # what the host's memory must move a second for the backward pass to hide the update; None: the copies alone outlast it
    host_gbps_to_hide: float | None = 0.0
    passes_seconds: float = 0.0
    update_seconds: float = 0.0  # what the passes do not hide of it
    at_least: bool = False  # weights, whole gradients and states alone do not fit: nothing else was counted

    @property
    def fits(self) -> bool:
        return self.left_bytes >= 0

    def facts(self) -> dict[str, Any]:
        """Ready for JSON."""
        options = {
            name: str(value).removeprefix("torch.") for name, value in self.configuration.options.items()
        }
        return dataclasses.asdict(self) | {
            "configuration": dataclasses.asdict(self.configuration) | {"options": options},
            "fits": self.fits,
            "seconds": self.seconds,
        }

    @property
    def seconds(self) -> float:
        return self.passes_seconds + self.update_seconds


def plans(
    sizes: Sequence[int],  # elements of each parameter
    pass_of: PeakOf,
    job: Job,
    machine: Machine,
    configurations: Sequence[Configuration] = CONFIGURATIONS,
) -> list[Plan]:
    return [_plan(one, sizes, pass_of, job, machine) for one in configurations if job.allows(one)]


def choose(found: Sequence[Plan]) -> Plan | None:
    """The fastest of those that fit; of equally fast ones the first, which is the most exact. None where none fits."""
    fitting = [plan for plan in found if plan.fits]
    fastest = min((plan.seconds for plan in fitting), default=0.0)
    return next((plan for plan in fitting if plan.seconds <= SAME_TIME * fastest), None)


def _plan(
    one: Configuration,
    sizes: Sequence[int],
    pass_of: PeakOf,
    job: Job,
    machine: Machine,
) -> Plan:
    card_bytes = job.card_bytes
    weights = sum(sizes) * torch.bfloat16.itemsize
    options = {**job.options, **{name: value for name, value in one.options.items() if name != "offload"}}
    state = footprint.masked_ema_adamw(sizes, torch.bfloat16, **options)["total"]
    beside = RESERVED + (0 if one.offloaded else state)
    least = beside + weights + (0 if one.release and job.accumulation == 1 else weights)
    if least > card_bytes:
        return Plan(one, least, card_bytes - least, at_least=True)
    # with the gradients of all passes before it, a pass holds one of its own at a time
    kept = weights if job.accumulation > 1 else 0
    device = beside + kept + pass_of(one.checkpointing, one.release or kept > 0)
    forward = 2 * sum(sizes) * job.tokens / machine.compute
    backward = (3 if one.checkpointing else 2) * forward  # the last one hides an update
    passes = job.accumulation * (forward + backward)
    moved = 3 * weights + 2 * state  # weights in and out, gradients in, states in and out
    if not one.offloaded:
        return Plan(
            one,
            device,
            card_bytes - device,
            passes_seconds=passes,
            update_seconds=moved / machine.memory,
        )
    # gradients and weights come down while weights go up, and the host steps what has arrived
    room = [2 * n * torch.bfloat16.itemsize for n in sizes]  # a weight and its gradient
    staging = max(max(room), min(sum(room), STAGING_BYTES))
    device += staging // 2  # gradients that wait for their copy
    moved += 3 * weights  # what the link writes and reads there
    copies = 2 * weights / machine.link
    update = max(copies, moved / machine.host)
    return Plan(
        one,
        device,
        card_bytes - device,
        host_bytes=_pinned(staging) + sum(_pinned_state(n, options) for n in sizes),
        host_gbps_to_hide=moved / backward / GB if copies <= backward else None,
        passes_seconds=passes,
        update_seconds=max(0.0, update - backward),
    )


def _pinned_state(n_elements: int, options: Mapping[str, Any]) -> int:
    parts = footprint.tensors(n_elements, torch.bfloat16, **options).values()
    return sum(_pinned(one) for kind in parts for one in kind)


def _pinned(n_bytes: int) -> int:
    """What torch 2.13 takes for so many bytes of pinned memory: powers of two, unless ``UNROUNDED`` is set."""
    return 1 << (n_bytes - 1).bit_length() if n_bytes else 0
