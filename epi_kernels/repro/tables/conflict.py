"""How much the gradients of tasks learned together conflict, by the observer "conflict"."""

from __future__ import annotations

from collections.abc import Sequence

from epi_kernels.repro import published_values as printed
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.preset import Preset, Try
from epi_kernels.repro.runs import Run
from epi_kernels.repro.tables import access, paper, plans
from epi_kernels.repro.tables.base import Cell, Manifests, Rendered
from epi_kernels.repro.tables.mixtures import FULL, arms_note
from epi_kernels.repro.tables.results import Results, Rows, series
from epi_kernels.repro.tables.words import INTERVALS, compared
from epi_kernels.repro.writers.findings import ours

OBSERVE = ("conflict",)


class Conflict:
    name = "epi-conflict"
    title = "Conflict between the gradients of tasks"
    source = "EPI, gradient conflict"

    def methods(self, preset: Preset) -> dict[str, Try]:
        plan = access.mixture_plan(preset, self.name)
        if len(plan.tasks) < 2:
            raise ReproError(
                f"--table {self.name}: preset {preset.name}: a mixture of one task has no conflict"
            )
        return {FULL: plans.full_try(plan), **plans.other_arms(plan)}

    def run(self, preset: Preset, one: Try, seed: int) -> Run:
        return plans.mixture(preset, one, seed, observe=OBSERVE)

    def runs(self, preset: Preset) -> Sequence[Run]:
        return [self.run(preset, one, seed) for one in self.methods(preset).values() for seed in preset.seeds]

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        results, tasks = Results.of(self, preset, found), plans.mixture_tasks(preset)
        rows, free = Rows(results), {}
        for name, one in self.methods(preset).items():
            runs = [self.run(preset, one, seed) for seed in preset.seeds]
            means = [series(results, run, "conflict")["mean"] for run in runs]
            free[name] = [mean["free"]["score"] for mean in means]
            rows.add(
                name,
                Cell(values=tuple(mean["all"]["score"] for mean in means)),
                Cell(values=tuple(free[name])),
                Cell(values=tuple(mean["free"]["share"] for mean in means)),
                *(
                    Cell(values=tuple(mean["free"]["by_task"][index]["score"] for mean in means))
                    for index in range(len(tasks))
                ),
                runs=runs,
            )
        return rows.rendered(
            self,
            ["method", "all elements", "free elements", "pairs in conflict, %", *plans.kinds(tasks)],
            notes=(
                ours(
                    "Conflict score (the source does not define it): 100 times the mean over pairs of tasks of"
                    " max(0, -cosine of their gradients), averaged over the stage; 0: none, 100: opposite. Free: without"
                    " the elements that are isolated, which is what conflicts in what may still move. A task's score is"
                    " over the pairs it is in, of free elements; so is the share of pairs with a negative cosine."
                ),
                f"The source's score of code, not comparable: {paper.listed(printed.EPI_CONFLICT)}. {printed.EPI_SOURCE}",
                "These runs are observed and train as the scored ones of `epi-main` do; times are taken from those.",
                arms_note(access.mixture_plan(preset, self.name)),
                INTERVALS,
            ),
            findings=[
                compared(
                    name,
                    {"": [full - own for full, own in zip(free[FULL], free[name])]},
                    f"has less conflict in what may move than {FULL}",
                    f"has more conflict in what may move than {FULL}",
                    versus=FULL,
                    measure="points less",
                )
                for name in free
                if name != FULL
            ],
        )
