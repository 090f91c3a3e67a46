"""How much the gradients of tasks learned together conflict, by the observer "conflict"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from epi_kernels.repro import published_values as printed
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.measure.conflict import over_points
from epi_kernels.repro.methods.config import Inverted, Method, RandomMask
from epi_kernels.repro.preset import Preset, Try
from epi_kernels.repro.runs import Run
from epi_kernels.repro.tables import access, paper, plans
from epi_kernels.repro.tables.base import Cell, Manifests, Rendered
from epi_kernels.repro.tables.mixtures import FULL, arms_note
from epi_kernels.repro.tables.results import ISOLATION, Results, Rows, series
from epi_kernels.repro.tables.words import INTERVALS, compared
from epi_kernels.repro.writers.findings import ours

OBSERVE = ("conflict",)
ELEMENTS = ("all", "free")


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
        rows, scores = Rows(results), {}
        methods = self.methods(preset)
        for name, one in methods.items():
            runs = [self.run(preset, one, seed) for seed in preset.seeds]
            means = [self._means(results, run, seed, len(tasks)) for run, seed in zip(runs, preset.seeds)]
            scores[name] = {of: [mean[of]["score"] for mean in means] for of in ELEMENTS}
            rows.add(
                name,
                Cell(values=tuple(scores[name]["all"])),
                Cell(values=tuple(mean["all"]["share"] for mean in means)),
                *(
                    Cell(values=tuple(mean["all"]["by_task"][index]["score"] for mean in means))
                    for index in range(len(tasks))
                ),
                Cell(values=tuple(scores[name]["free"])) if isolates(one.method) else "-",
                runs=runs,
            )
        return rows.rendered(
            self,
            ["method", "all elements", "pairs in conflict, %", *plans.kinds(tasks), "free elements"],
            notes=(
                ours(
                    "Conflict score (the source does not define it): 100 times the mean over pairs of tasks of"
                    " max(0, -cosine of their gradients), averaged over training; 0: none, 100: opposite. A task's score is"
                    " over the pairs it is in; beside it the share of pairs with a negative cosine. All of this, and what"
                    " methods are compared by, is over all elements, isolated or not: the same ones for every method."
                ),
                "Free elements: the score of the same gradients without the elements that are isolated, which is what"
                " conflicts in what may still move. Fewer elements are other ones: it is held against all elements of the"
                " same run alone.",
                self._stretch(results),
                f"The source's score of code, not comparable: {paper.listed(printed.EPI_CONFLICT)}. {printed.EPI_SOURCE}",
                "These runs are observed and train as the scored ones of `epi-main` do; times are taken from those.",
                arms_note(access.mixture_plan(preset, self.name)),
                INTERVALS,
            ),
            findings=[
                compared(
                    name,
                    {"": [full - own for full, own in zip(scores[FULL]["all"], scores[name]["all"])]},
                    f"has less conflict than {FULL}",
                    f"has more conflict than {FULL}",
                    versus=FULL,
                    measure="points less, over all elements",
                    claim=isinstance(one.method, ISOLATION),
                )
                for name, one in methods.items()
                if name != FULL
            ]
            + [
                compared(
                    f"What {name} leaves free",
                    {"": [a - b for a, b in zip(scores[name]["all"], scores[name]["free"])]},
                    "conflicts less than all elements at the same weights",
                    "conflicts more than all elements at the same weights",
                    versus="all elements at the same weights",
                    measure="points less",
                    claim=False,
                )
                for name, one in methods.items()
                if isolates(one.method)
            ],
        )

    def _means(self, results: Results, run: Run, seed: int, tasks: int) -> Mapping[str, Any]:
        """Over the points that lie in the part of the budget in which every method's run is observed."""
        record, begun = series(results, run, "conflict"), self._begun(results, run, seed)
        first = self._first(results, seed)
        points = [point for point in record["points"] if begun + point["step"] >= first]
        return {of: over_points(points, of, tasks) for of in ELEMENTS}

    def _first(self, results: Results, seed: int) -> int:
        """The step of the budget from which on all methods' runs are observed: some begin after a stage."""
        preset = results.preset
        runs = [self.run(preset, one, seed) for one in self.methods(preset).values()]
        return max(self._begun(results, run, seed) for run in runs)

    def _begun(self, results: Results, run: Run, seed: int) -> int:
        """Steps of the budget that were spent before the run: full fine-tuning's run has all of them."""
        full = self.run(results.preset, self.methods(results.preset)[FULL], seed)
        return results.manifest(full).notes["steps"] - results.manifest(run).notes["steps"]

    def _stretch(self, results: Results) -> str:
        first = max(self._first(results, seed) for seed in results.preset.seeds)
        return (
            f"Averaged from step {first} of the budget on, when every run is observed: what rests on a stage before begins"
            " there."
            if first
            else "Averaged over the whole budget."
        )


def isolates(method: Method) -> bool:
    return isinstance(method, (*ISOLATION, RandomMask, Inverted))
