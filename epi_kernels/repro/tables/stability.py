"""What a refresh of the mask does to the training around it, by the observer "stability"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from epi_kernels.report import figures
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.methods.config import Epi
from epi_kernels.repro.preset import Preset
from epi_kernels.repro.runs import Run, key
from epi_kernels.repro.statistics import summary
from epi_kernels.repro.tables import access, plans
from epi_kernels.repro.tables.access import NoPlan
from epi_kernels.repro.tables.base import Cell, Figure, Manifests, Rendered
from epi_kernels.repro.tables.results import Results, Rows, pair_name, series
from epi_kernels.repro.tables.words import INTERVALS, compared, setting

OBSERVE = ("stability",)
STATISTICS = {
    "loss": "training loss",
    "validation": "held-out loss",
    "grad_norm": "gradient norm",
    "update": "size of the update",
}
REFRESH, MIDWAY = "refresh", "placebo"  # the observer's names of its windows


class Stability:
    name = "stability"
    title = "Training just before and just after a refresh of the mask"
    source = "asked for by EPI's referee"

    def arm(self, preset: Preset) -> str:
        """The sweep's arm, else the first evolving one. Raises ReproError."""
        arms = access.sequential_plan(preset, self.name).arms
        if preset.sweep is not None:
            return preset.sweep.of
        for name, arm in arms.items():
            if isinstance(arm.settled.method, Epi):
                return name
        raise NoPlan(f"--table {self.name}: preset {preset.name} has no evolving arm in `sequential`")

    def run(self, preset: Preset, seed: int) -> Run:
        plan = access.sequential_plan(preset, self.name)
        settled = plan.arms[self.arm(preset)].settled
        return plans.adapt(preset, plan.pairs[0], settled, seed, observe=OBSERVE)

    def runs(self, preset: Preset) -> Sequence[Run]:
        plan, arm = access.sequential_plan(preset, self.name), self.arm(preset)
        interval, steps = getattr(plan.arms[arm].settled.method, "interval", 0), plan.pairs[0].adapt.steps
        if steps is not None and interval >= steps:
            raise NoPlan(
                f"--table {self.name}: preset {preset.name}: {arm} refreshes every {interval} steps, the second stage has {steps}"
            )
        return [self.run(preset, seed) for seed in preset.seeds]

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        results = Results.of(self, preset, found)
        rows, runs = Rows(results), list(self.runs(preset))
        recorded = [series(results, run, "stability") for run in runs]
        for run, one in zip(runs, recorded):
            if any(one["mean"][kind][name] is None for kind in (REFRESH, MIDWAY) for name in STATISTICS):
                raise ReproError(
                    f"--table {self.name}: run {key(run)} holds no whole window around a refresh and midway between two:"
                    " its interval is too long for its steps"
                )
        differences = {}
        for name, label in STATISTICS.items():
            at = {
                kind: [100 * (one["mean"][kind][name] - 1) for one in recorded] for kind in (REFRESH, MIDWAY)
            }
            differences[label] = [x - y for x, y in zip(at[REFRESH], at[MIDWAY])]
            rows.add(
                label,
                Cell(values=tuple(at[REFRESH]), signed=True, digits=2),
                Cell(values=tuple(at[MIDWAY]), signed=True, digits=2),
                Cell(values=tuple(differences[label]), signed=True, digits=2),
                runs=runs,
            )
        plan, arm = access.sequential_plan(preset, self.name), self.arm(preset)
        counts = [one["mean"][REFRESH]["n"] for one in recorded]
        return rows.rendered(
            self,
            ["change, after against before, %", "at a refresh", "midway between two", "difference"],
            notes=(
                f"{pair_name(plan.pairs[0])}, arm {arm}: {setting(plan.arms[arm].settled)};"
                f" {min(counts)} to {max(counts)} refreshes a run.",
                f"Means over at most {recorded[0]['window']} steps before and as many after, averaged over the refreshes of a"
                " run. Midway between two refreshes nothing happens: what changes there is trend, schedule and noise.",
                "These runs are observed and train as the scored ones do.",
                INTERVALS,
            ),
            figures=(self._figure(preset, recorded),),
            findings=[
                compared(
                    "A refresh",
                    differences,
                    "raises more than midway between refreshes",
                    "lowers more than midway between refreshes",
                    versus="midway between two refreshes",
                    everywhere="in all four",
                    measure="percentage points",
                    digits=2,
                    claim=False,
                )
            ],
        )

    def _figure(self, preset: Preset, recorded: Sequence[Mapping[str, Any]]) -> Figure:
        def draw(figure: Any) -> None:
            grid = figure.subplots(2, 2, sharex=True)
            for axes, (name, label) in zip(grid.flat, STATISTICS.items()):
                figures.plain(axes, "steps after it", f"{label}, of the mean before")
                for kind, text, color in (
                    (REFRESH, "a refresh", figures.COLORS[1]),
                    (MIDWAY, "midway between two", figures.COLORS[0]),
                ):
                    at = _aligned(recorded, kind, name)
                    mean = {step: summary(values).mean for step, values in sorted(at.items())}
                    axes.plot(list(mean), list(mean.values()), "o-", color=color, label=text, markersize=3)
                axes.axvline(0.5, color=figures.SOFT, linewidth=1, linestyle=":")
            grid.flat[0].legend(frameon=False, fontsize=8)

        return Figure(
            name="stability",
            caption="Around a refresh and midway between two, each over its mean before; mean over events and"
            f" {len(preset.seeds)} seeds. The new mask acts from step 1 on.",
            draw=draw,
            size=(8.0, 6.0),
        )


def _aligned(recorded: Sequence[Mapping[str, Any]], kind: str, name: str) -> dict[int, list[float]]:
    """Steps after the event -> the statistic over its mean before, of all events and seeds."""
    found: dict[int, list[float]] = {}
    for one in recorded:
        rows = {row["step"]: row for row in one["rows"]}
        for event in one["events"]:
            before = event["before"][name]
            if event["kind"] != kind or not before:
                continue
            for offset in range(1 - event["half"], event["half"] + 1):
                found.setdefault(offset, []).append(rows[event["step"] + offset][name] / before)
    return found
