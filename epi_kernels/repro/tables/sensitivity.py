"""CPI-FT's settings: the similarity threshold tau (its Figure 2) and the share p of a core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from epi_kernels.report import figures
from epi_kernels.repro import published_values as printed
from epi_kernels.repro.preset import CpiFtPlan, Preset
from epi_kernels.repro.runs import Run
from epi_kernels.repro.statistics import summary
from epi_kernels.repro.tables import access, plans
from epi_kernels.repro.tables.access import NoPlan
from epi_kernels.repro.tables.base import Cell, Figure, Manifests, Rendered
from epi_kernels.repro.tables.mixtures import AVERAGE, AVERAGE_NOTE, budget
from epi_kernels.repro.tables.results import Results, Rows, metrics
from epi_kernels.repro.tables.words import INTERVALS, compared


class Sensitivity:
    """One value after the other of a field of CPI-FT, on every model."""

    name: str
    title: str
    source: str
    field: str  # of runs.CpiFt
    column: str

    def swept(self, plan: CpiFtPlan) -> tuple[float, ...]:
        """The values to try besides the plan's own."""
        raise NotImplementedError

    def own(self, plan: CpiFtPlan) -> float:
        return getattr(plan, self.field)

    def notes(self) -> tuple[str, ...]:
        return ()

    def values(self, preset: Preset) -> list[float]:
        """Raises ReproError when the preset sweeps nothing."""
        plan = access.mixture_plan(preset, self.name).cpift
        if not self.swept(plan):
            raise NoPlan(
                f"--table {self.name}: preset {preset.name} has no plan for it: no values of {self.column}"
            )
        return sorted({*self.swept(plan), self.own(plan)})

    def run(self, preset: Preset, model: str, value: float, seed: int) -> Run:
        return plans.mixture_cpift(preset, seed, model, **{self.field: value})

    def runs(self, preset: Preset) -> Sequence[Run]:
        values = self.values(preset)
        return [
            self.run(preset, model, value, seed)
            for model in preset.models
            for value in values
            for seed in preset.seeds
        ]

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        results, plan = Results.of(self, preset, found), access.mixture_plan(preset, self.name)
        rows, tasks, values = Rows(results), plans.mixture_tasks(preset), self.values(preset)
        averages: dict[str, dict[float, tuple[float, ...]]] = {}
        for model in preset.models:
            for value in values:
                runs = [self.run(preset, model, value, seed) for seed in preset.seeds]
                averages.setdefault(model, {})[value] = tuple(results.average(run, tasks) for run in runs)
                counts = [float(len(results.manifest(run).notes.get("groups", ()))) for run in runs]
                groups = Cell(values=tuple(counts)) if all(counts) else ""
                rows.add(
                    model, f"{value:g}", Cell(values=averages[model][value], digits=2), groups, runs=runs
                )
        return rows.rendered(
            self,
            ["model", self.column, AVERAGE, "groups"],
            notes=(metrics(tasks), AVERAGE_NOTE, *self.notes(), budget(plan), INTERVALS),
            figures=(self._figure(preset, averages),),
            findings=self.findings(preset, averages),
        )

    def findings(self, preset: Preset, averages: dict[str, dict[float, tuple[float, ...]]]) -> list[str]:
        """Whether the plan's own value beats each of the others, over the models."""
        own = self.own(access.mixture_plan(preset, self.name).cpift)
        return [
            compared(
                f"CPI-FT at {self.column} {own:g}",
                {
                    model: [x - y for x, y in zip(by_value[own], by_value[value])]
                    for model, by_value in averages.items()
                },
                f"beats {self.named(value)} in the average",
                f"loses to {self.named(value)} in the average",
                versus=self.named(value),
                everywhere=f"on all {len(averages)} models",
                digits=2,
            )
            for value in self.values(preset)
            if value != own
        ]

    def named(self, value: float) -> str:
        return f"{self.column} {value:g}"

    def _figure(self, preset: Preset, averages: dict[str, dict[float, tuple[float, ...]]]) -> Figure:
        def draw(figure: Any) -> None:
            axes = figure.subplots()
            figures.plain(axes, self.column, AVERAGE)
            for (model, by_value), color in zip(averages.items(), figures.COLORS * len(averages)):
                found = {value: summary(scores) for value, scores in sorted(by_value.items())}
                axes.errorbar(
                    list(found),
                    [one.mean for one in found.values()],
                    yerr=[one.sd for one in found.values()],
                    fmt="o-",
                    color=color,
                    label=model,
                )
            axes.legend(frameon=False, fontsize=8)

        caption = f"CPI-FT's average by {self.column}, mean ± sd over {len(preset.seeds)} seeds."
        return Figure(name=self.name, caption=caption, draw=draw)


class Tau(Sensitivity):
    name, field, column = "cpift-tau", "tau", "tau"
    title, source = "How similar cores must be to share a stage", "CPI-FT, Figure 2"

    def swept(self, plan: CpiFtPlan) -> tuple[float, ...]:
        return plan.taus

    def named(self, value: float) -> str:
        return "no grouping (tau 0)" if value == 0 else f"tau {value:g}"

    def notes(self) -> tuple[str, ...]:
        return (
            "At tau = 0 every pair of tasks is similar enough: one group, which the source calls no grouping.",
            printed.INCONSISTENCIES["names"],
        )


class CoreRatio(Sensitivity):
    name, field, column = "cpift-p", "core_ratio", "p"
    title, source = "How much of a model is a task's core", "CPI-FT, sensitivity to p"

    def swept(self, plan: CpiFtPlan) -> tuple[float, ...]:
        return plan.ratios
