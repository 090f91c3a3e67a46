"""What every arm takes of memory and time, from the runs whose scores the other tables show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from epi_kernels import published
from epi_kernels.repro.manifest import Manifest
from epi_kernels.repro.methods.config import Epi, Method, PublishedEpi
from epi_kernels.repro.preset import Preset
from epi_kernels.repro.runs import CpiFt, Run, Train
from epi_kernels.repro.tables import access, plans
from epi_kernels.repro.tables.access import NoPlan
from epi_kernels.repro.tables.base import Cell, Manifests, Rendered
from epi_kernels.repro.tables.cost import Cost, peak_note, peak_of, peaks_of, state_of, step_of, training_of
from epi_kernels.repro.tables.mixtures import EpiMain
from epi_kernels.repro.tables.results import Results, Rows, RunOf, pair_name
from epi_kernels.repro.tables.sequential import methods as sequential_methods
from epi_kernels.repro.tables.words import INTERVALS, compared
from epi_kernels.repro.writers.findings import failed, held


class Row(NamedTuple):
    plan: str
    name: str
    method: Method | None  # of an arm
    run_of: RunOf
    whole: bool = False  # every stage since the base model counts; else the run's own alone

    def stages(self, seed: int) -> list[Run]:
        """Those that count, the last one first."""
        stages = [self.run_of(seed)]
        while self.whole and isinstance(run := stages[-1], Train) and isinstance(run.before, Train):
            stages.append(run.before)
        return stages


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
                yield Row("mixture", name, arms[name].method if name in arms else None, run_of, whole=True)

    def runs(self, preset: Preset) -> Sequence[Run]:
        return [run for row in self.rows(preset) for seed in preset.seeds for run in row.stages(seed)]

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        results = Results.of(self, preset, found)
        rows, listed = Rows(results), list(self.rows(preset))
        manifests = {
            (row.plan, row.name): [
                [results.manifest(run) for run in row.stages(seed)] for seed in preset.seeds
            ]
            for row in listed
        }
        measured = {place: [Cost.of(stages) for stages in of_row] for place, of_row in manifests.items()}
        peaks = peaks_of(one for of_row in measured.values() for one in of_row)
        above = all(one.before is not None for one in peaks)
        as_published = {
            row.plan: measured[row.plan, row.name] for row in listed if isinstance(row.method, PublishedEpi)
        }
        for row in listed:
            costs = measured[row.plan, row.name]
            size, step = state_of(costs), step_of(costs)
            against = (
                state_of(as_published[row.plan]) if row.plan in as_published else (_published(),) * len(size)
            )
            their_step = step_of(as_published[row.plan]) if row.plan in as_published else ()
            rows.add(
                row.plan,
                row.name,
                Cell(values=size, digits=3) if size else "",
                Cell(values=tuple(100 * x / y for x, y in zip(size, against)), digits=0)
                if size and against
                else "",
                Cell(values=peak, digits=1 if above else 0) if (peak := peak_of(costs, above)) else "",
                Cell(values=step, digits=3) if step else "",
                Cell(values=tuple(100 * x / y for x, y in zip(step, their_step)), digits=0)
                if step and their_step
                else "",
                Cell(values=whole, digits=2) if (whole := training_of(costs)) else "",
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
            notes=self._notes(
                [one for of_row in manifests.values() for of_seed in of_row for one in of_seed],
                measured,
                as_published,
                peak_note(peaks, above),
            ),
            findings=self._findings(listed, measured, as_published),
        )

    def _notes(
        self,
        manifests: Sequence[Manifest],
        measured: dict[tuple[str, str], list[Cost]],
        as_published: dict[str, list[Cost]],
        of_peaks: Sequence[str],
    ) -> tuple[str, ...]:
        machines = {repr(sorted(one.machine.items())) for one in manifests}
        lacking = sorted({plan for plan, _ in measured} - set(as_published))
        last_alone = any(isinstance(one.run, CpiFt) and "stages" not in one.notes for one in manifests)
        return (
            "State: what the optimizer and the method keep, from the very runs whose scores are shown. Step: the median of a"
            " run's steps. A row that keeps no bytes is empty.",
            "Of two tasks one after the other the second stage counts, the first being the same for all. Of a mixture every"
            " stage does, what a method takes from a stage before it too: the largest state, the highest peak, and of the"
            " stages' times the mean over all their steps.",
            *(
                [
                    "CPI-FT's state, peak and times are of its last stage alone: its runs were made by a version that kept"
                    " no others."
                ]
                if last_alone
                else []
            ),
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
            *of_peaks,
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
        measured: dict[tuple[str, str], list[Cost]],
        as_published: dict[str, list[Cost]],
    ) -> list[str]:
        findings = []
        for row in listed:
            costs = measured[row.plan, row.name]
            size = state_of(costs)
            if not isinstance(row.method, Epi) or not size:
                continue
            measured_theirs = state_of(as_published.get(row.plan, []))
            theirs = measured_theirs or (float(_published()),)
            how = "" if measured_theirs else " by its description"
            told = (
                f"{row.name} ({row.plan}) keeps {max(size):.3f} bytes of state a parameter, EPI as published"
                f" {min(theirs):.3f}{how}."
            )
            findings.append((held if max(size) < min(theirs) else failed)(told))
            steps, their_steps = step_of(costs), step_of(as_published.get(row.plan, []))
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
