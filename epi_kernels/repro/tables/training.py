"""The training around the method: learning-rate schedules, accumulation and clipping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from epi_kernels.repro.preset import Preset
from epi_kernels.repro.runs import Run
from epi_kernels.repro.tables import access, plans
from epi_kernels.repro.tables.base import Cell, Manifests, Rendered
from epi_kernels.repro.tables.results import Results, Rows, RunOf, metrics, pair_name
from epi_kernels.repro.tables.sequential import PERCENT, STAGES
from epi_kernels.repro.tables.sweeps import swept
from epi_kernels.repro.tables.words import INTERVALS, compared, setting


class Circumstances:
    """A table of recipes: full fine-tuning and the sweep's arm under each, on the first pair, at the same rate."""

    name: str
    title: str
    source: str
    column: str

    def recipes(self, preset: Preset) -> dict[str, dict[str, Any]]:
        """Label -> changes of the second stage's recipe. Raises ReproError."""
        raise NotImplementedError

    def methods(self, preset: Preset, changes: dict[str, Any]) -> tuple[RunOf, RunOf]:
        """Full fine-tuning at the arm's learning rate, and the arm."""
        pair, settled, _ = swept(preset, self.name)
        return (
            lambda seed: plans.full_run(preset, pair, settled.lr, seed, **changes),
            lambda seed: plans.adapt(preset, pair, settled, seed, **changes),
        )

    def runs(self, preset: Preset) -> Sequence[Run]:
        recipes = self.recipes(preset)
        pair, _, _ = swept(preset, self.name)
        return [plans.learn(preset, pair, seed) for seed in preset.seeds] + [
            run_of(seed)
            for changes in recipes.values()
            for run_of in self.methods(preset, changes)
            for seed in preset.seeds
        ]

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        results = Results.of(self, preset, found)
        rows, (pair, settled, _) = Rows(results), swept(preset, self.name)
        arm, kept, learned = access.sweep_plan(preset, self.name).of, {}, {}
        for label, changes in self.recipes(preset).items():
            full_of, arm_of = self.methods(preset, changes)
            full, ours = results.points(pair, full_of), results.points(pair, arm_of)
            kept[label] = tuple(x.a - y.a for x, y in zip(ours, full))
            learned[label] = tuple(x.b - y.b for x, y in zip(ours, full))
            for name, run_of, points in (("full SFT", full_of, full), (arm, arm_of, ours)):
                differs = name == arm
                rows.add(
                    label,
                    name,
                    Cell(values=tuple(point.a for point in points)),
                    Cell(values=tuple(point.b for point in points)),
                    Cell(values=kept[label], signed=True) if differs else "",
                    Cell(values=learned[label], signed=True) if differs else "",
                    runs=map(run_of, preset.seeds),
                )
        scope = f"under all {len(kept)} settings"
        rate = pair.adapt.lr if settled.lr is None else settled.lr
        return rows.rendered(
            self,
            [self.column, "method", "first", "second", "first, over full SFT", "second, over full SFT"],
            notes=(
                metrics(plans.sequential_tasks(preset)),
                PERCENT,
                f"{pair_name(pair)}, both at learning rate {rate:g}. Arm {arm}: {setting(settled)}.",
                "Differences are from full SFT under the same setting and at the same learning rate, not at the same score"
                " on the second task: dA@B would need full SFT's frontier under every setting.",
                STAGES,
                INTERVALS,
            ),
            findings=[
                compared(
                    arm,
                    kept,
                    "keeps more of the first task than full SFT at the same learning rate",
                    "keeps less of the first task than full SFT at the same learning rate",
                    versus="full SFT at the same learning rate",
                    everywhere=scope,
                    measure="first",
                    claim=False,  # freezing acts like a smaller learning rate
                ),
                compared(
                    arm,
                    learned,
                    "learns the second task better than full SFT at the same learning rate",
                    "learns the second task less well than full SFT at the same learning rate",
                    versus="full SFT at the same learning rate",
                    everywhere=scope,
                    measure="second",
                    claim=False,
                ),
            ],
        )


class Schedule(Circumstances):
    name, column = "epi-schedule", "schedule"
    title, source = "Learning-rate schedules", "asked for by EPI's referee"

    def recipes(self, preset: Preset) -> dict[str, dict[str, Any]]:
        sweep = access.sweep_plan(preset, self.name, "schedules")
        return {schedule: {"schedule": schedule} for schedule in sweep.schedules}


class Accumulation(Circumstances):
    name, column = "epi-accumulation", "accumulation, clipping"
    title, source = "Accumulation and clipping", "asked for by EPI's referee (batch averaging and noise)"

    def recipes(self, preset: Preset) -> dict[str, dict[str, Any]]:
        """Every accumulation with every clipping; a list that is empty stands for the recipe's own."""
        sweep = access.sweep_plan(preset, self.name, "accumulations", "clips")
        recipe = swept(preset, self.name)[0].adapt
        return {
            f"{count}, {'off' if clip is None else f'at {clip:g}'}": {"accumulation": count, "clip": clip}
            for count in sweep.accumulations or (recipe.accumulation,)
            for clip in sweep.clips or (recipe.clip,)
        }
