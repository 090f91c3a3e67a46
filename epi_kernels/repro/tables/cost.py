"""What runs took of memory and time, for tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from epi_kernels.repro.manifest import Bytes, Manifest, StepTime
from epi_kernels.repro.measure.cost import mean_time, most

MIB = 2**20


class Cost(NamedTuple):
    """Of a row's stages, at one seed."""

    bytes: Bytes | None
    time: StepTime | None

    @classmethod
    def of(cls, stages: Sequence[Manifest]) -> Cost:
        return cls(
            most([one.bytes for one in stages if one.bytes]),
            mean_time([one.time for one in stages if one.time]),
        )


def state_of(costs: Sequence[Cost]) -> tuple[float, ...]:
    """Bytes a parameter, of every run; empty unless all have them."""
    return _of_all(costs, [one.bytes.optimizer["total"] / one.bytes.parameters for one in costs if one.bytes])


def peak_of(costs: Sequence[Cost], above: bool) -> tuple[float, ...]:
    """MiB; `above`: over what was held before."""
    found = [one.bytes for one in costs if one.bytes and one.bytes.peak is not None]
    return _of_all(costs, [((one.peak or 0) - (one.before or 0) * above) / MIB for one in found])


def step_of(costs: Sequence[Cost]) -> tuple[float, ...]:
    return _of_all(costs, [one.time.optimizer_p50 for one in costs if one.time])


def training_of(costs: Sequence[Cost]) -> tuple[float, ...]:
    return _of_all(costs, [one.time.training_p50 for one in costs if one.time])


def _of_all(costs: Sequence[Cost], found: list[float]) -> tuple[float, ...]:
    return tuple(found) if len(found) == len(costs) else ()


def peaks_of(costs: Iterable[Cost]) -> list[Bytes]:
    return [one.bytes for one in costs if one.bytes and one.bytes.peak is not None]


def peak_note(peaks: Sequence[Bytes], above: bool) -> list[str]:
    if not peaks:
        return []
    of = ", the ".join(sorted({one.peak_of for one in peaks}))
    if above:
        return [f"Peak: of the {of}, above what was held before the run's model was loaded."]
    return [f"Peak: of the {of}, with all it held already, of runs before too: rows compare little."]
