"""What every arm takes of memory and time, from the runs whose scores the other tables show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from epi_kernels import published
from epi_kernels.repro.manifest import Manifest
from epi_kernels.repro.methods.config import Epi, Method, PublishedEpi
from epi_kernels.repro.preset import Preset
from epi_kernels.repro.runs import Run
from epi_kernels.repro.tables import access, plans
from epi_kernels.repro.tables.access import NoPlan
from epi_kernels.repro.tables.base import Cell, Manifests, Rendered
from epi_kernels.repro.tables.mixtures import EpiMain
from epi_kernels.repro.tables.results import Results, Rows, RunOf, pair_name
from epi_kernels.repro.tables.sequential import methods as sequential_methods
from epi_kernels.repro.tables.words import INTERVALS, compared
from epi_kernels.repro.writers.findings import failed, held

MIB = 2**20


class Row(NamedTuple):
    plan: str
    name: str
    method: Method | None  # of an arm
    run_of: RunOf


class Memory:
    name = "memory"
    title = "Optimizer state, peak memory and time of a step"
    source = "EPI, limitations: the memory of a per-parameter average"

    def rows(self, preset: Preset) -> Iterator[Row]:
        """The first pair's second stage, and the mixture on the first model. Raises ReproError when there is neither."""
        if preset.sequential is None and preset.mixture is None:
            raise NoPlan(
                f"--table {self.name}: preset {preset.name} has no plan `sequential` and no `mixture`"
            )
        if preset.sequential is not None:
            plan = access.sequential_plan(preset, self.name)
            pair = plan.pairs[0]
            for name, run_of in sequential_methods(preset, pair).items():
                method = plan.arms[name].settled.method if name in plan.arms else None
                yield Row(pair_name(pair), name, method, run_of)
        if preset.mixture is not None:
            arms = plans.other_arms(access.mixture_plan(preset, self.name))
            for name, run_of in EpiMain().methods(preset, plans.first_model(preset)).items():
                yield Row("mixture", name, arms[name].method if name in arms else None, run_of)

    def runs(self, preset: Preset) -> Sequence[Run]:
        return [row.run_of(seed) for row in self.rows(preset) for seed in preset.seeds]

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        results = Results.of(self, preset, found)
        rows, listed, measured = Rows(results), list(self.rows(preset)), {}
        for row in listed:
            measured[row.plan, row.name] = [results.manifest(row.run_of(seed)) for seed in preset.seeds]
        as_published = {
            row.plan: measured[row.plan, row.name] for row in listed if isinstance(row.method, PublishedEpi)
        }
        for row in listed:
            manifests = measured[row.plan, row.name]
            size, step = _state(manifests), _step(manifests)
            against = (
                _state(as_published[row.plan]) if row.plan in as_published else (_published(),) * len(size)
            )
            their_step = _step(as_published[row.plan]) if row.plan in as_published else ()
            rows.add(
                row.plan,
                row.name,
                Cell(values=size, digits=3) if size else "",
                Cell(values=tuple(100 * x / y for x, y in zip(size, against)), digits=0)
                if size and against
                else "",
                Cell(values=peak, digits=0) if (peak := _peak(manifests)) else "",
                Cell(values=step, digits=3) if step else "",
                Cell(values=tuple(100 * x / y for x, y in zip(step, their_step)), digits=0)
                if step and their_step
                else "",
                Cell(values=whole, digits=2) if (whole := _training(manifests)) else "",
                runs=map(row.run_of, preset.seeds),
            )
        return rows.rendered(
            self,
            [
                "plan",
                "method",
                "state, bytes/parameter",
                "state, of published, %",
                "peak, MiB",
                "optimizer step, ms",
                "step, of published, %",
                "training step, ms",
            ],
            notes=self._notes(measured, as_published),
            findings=self._findings(listed, measured, as_published),
        )

    def _notes(
        self, measured: dict[tuple[str, str], list[Manifest]], as_published: dict[str, list[Manifest]]
    ) -> tuple[str, ...]:
        manifests = [one for of_row in measured.values() for one in of_row]
        of = sorted({one.bytes.peak_of for one in manifests if one.bytes and one.bytes.peak is not None})
        machines = {repr(sorted(one.machine.items())) for one in manifests}
        lacking = sorted({plan for plan, _ in measured} - set(as_published))
        return (
            "State: what the optimizer and the method keep, from the very runs whose scores are shown. Step: the median of a"
            " run's steps; of stages in sequence the last one. A multi-stage or CPI-FT row that keeps no bytes is empty.",
            *(
                [
                    f"Published: {published.STATE_TOTAL_BYTES} bytes a parameter by EPI's description, not measured, for"
                    f" {', '.join(lacking)}: the plan has no arm of it."
                ]
                if lacking
                else []
            ),
            *(
                ["Published: EPI as its paper describes it, with plain torch operations, run here as an arm."]
                if as_published
                else []
            ),
            f"A refresh as published takes {published.REFRESH_BYTES} more bytes a parameter while it lasts, or more.",
            *([f"Peak: of the {', the '.join(of)}."] if of else []),
            *(
                [f"The runs come from {len(machines)} machines; times compare little."]
                if len(machines) > 1
                else []
            ),
            INTERVALS,
        )

    def _findings(
        self,
        listed: Sequence[Row],
        measured: dict[tuple[str, str], list[Manifest]],
        as_published: dict[str, list[Manifest]],
    ) -> list[str]:
        findings = []
        for row in listed:
            manifests = measured[row.plan, row.name]
            size = _state(manifests)
            if not isinstance(row.method, Epi) or not size:
                continue
            measured_theirs = _state(as_published.get(row.plan, []))
            theirs = measured_theirs or (float(_published()),)
            how = "" if measured_theirs else " by its description"
            told = (
                f"{row.name} ({row.plan}) keeps {max(size):.3f} bytes of state a parameter, EPI as published"
                f" {min(theirs):.3f}{how}."
            )
            findings.append((held if max(size) < min(theirs) else failed)(told))
            steps, their_steps = _step(manifests), _step(as_published.get(row.plan, []))
            if steps and their_steps:
                findings.append(
                    compared(
                        f"{row.name} ({row.plan})",
                        {"": [y - x for x, y in zip(steps, their_steps)]},
                        "steps faster than EPI as published",
                        "steps slower than EPI as published",
                        versus="EPI as published",
                        measure="ms less",
                        digits=3,
                    )
                )
        return findings


def _published() -> float:
    return published.STATE_TOTAL_BYTES


def _state(manifests: Sequence[Manifest]) -> tuple[float, ...]:
    """Bytes a parameter, of every run; empty unless all have them."""
    found = [one.bytes.optimizer["total"] / one.bytes.parameters for one in manifests if one.bytes]
    return tuple(found) if len(found) == len(manifests) else ()


def _peak(manifests: Sequence[Manifest]) -> tuple[float, ...]:
    found = [one.bytes.peak / MIB for one in manifests if one.bytes and one.bytes.peak is not None]
    return tuple(found) if len(found) == len(manifests) else ()


def _step(manifests: Sequence[Manifest]) -> tuple[float, ...]:
    found = [one.time.optimizer_p50 for one in manifests if one.time]
    return tuple(found) if len(found) == len(manifests) else ()


def _training(manifests: Sequence[Manifest]) -> tuple[float, ...]:
    found = [one.time.training_p50 for one in manifests if one.time]
    return tuple(found) if len(found) == len(manifests) else ()
