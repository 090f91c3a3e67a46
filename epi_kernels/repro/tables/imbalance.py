"""Each task in turn cut to a share of its data: CPI-FT's Table 4."""

from __future__ import annotations

import math
from collections.abc import Sequence

from epi_kernels.repro import published_values as printed
from epi_kernels.repro.preset import Preset
from epi_kernels.repro.runs import Run
from epi_kernels.repro.statistics import summary
from epi_kernels.repro.tables import access, plans
from epi_kernels.repro.tables.base import Cell, Manifests, Rendered
from epi_kernels.repro.tables.mixtures import CPIFT, budget
from epi_kernels.repro.tables.results import Results, Rows, metrics
from epi_kernels.repro.tables.words import INTERVALS, compared, setting

FULL = "full SFT"


class Imbalanced:
    name = "cpift-4"
    title = "One task with little data among tasks with much"
    source = "CPI-FT, Table 4"

    def methods(self, preset: Preset) -> list[str]:
        return [FULL, CPIFT, *plans.other_arms(access.imbalance_plan(preset, self.name))]

    def run(self, preset: Preset, method: str, scarce: str, share: float, seed: int) -> Run:
        plan, tasks = access.imbalance_plan(preset, self.name), plans.cut(preset, scarce, share)
        if method == CPIFT:
            return plans.cpift_run(plans.base(preset), tasks, plan.cpift, seed)
        one = plans.full_try(plan) if method == FULL else plans.other_arms(plan)[method]
        return plans.mixed(plans.base(preset), tasks, plan, one, seed)

    def runs(self, preset: Preset) -> Sequence[Run]:
        plan = access.imbalance_plan(preset, self.name)
        return [
            self.run(preset, method, scarce, share, seed)
            for scarce in plan.tasks
            for method in self.methods(preset)
            for share in plan.shares
            for seed in preset.seeds
        ]

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        results, plan = Results.of(self, preset, found), access.imbalance_plan(preset, self.name)
        rows, shares = Rows(results), sorted(plan.shares, reverse=True)
        low: dict[tuple[str, float], list[tuple[float, ...]]] = {}  # a task each, in percent
        high: dict[tuple[str, float], list[tuple[float, ...]]] = {}
        for scarce in plan.tasks:
            for method in self.methods(preset):
                own, others = [], []
                for share in shares:
                    ours, theirs = self._scores(results, method, scarce, share)
                    low.setdefault((method, share), []).append(ours)
                    high.setdefault((method, share), []).append(theirs)
                    own.append(Cell(values=ours))
                    others.append(Cell(values=theirs))
                runs = [
                    self.run(preset, method, scarce, share, seed) for share in shares for seed in preset.seeds
                ]
                rows.add(scarce, method, *own, *others, runs=runs)
        tasks = access.specs(preset, plan.tasks)
        arms = "; ".join(f"{name}: {setting(one)}" for name, one in plans.other_arms(plan).items())
        gain = ", ".join(
            f"{gain:+.2f} at {100 * share:g} %" for share, gain in printed.imbalance_gains().items()
        )
        return rows.rendered(
            self,
            [
                "cut task",
                "method",
                *(f"it, {100 * share:g} % of its data" for share in shares),
                *(f"others, {100 * share:g} %" for share in shares),
            ],
            notes=(
                metrics(tasks),
                "Scores are in percent of the full mark; others: the mean over the tasks that keep all their data.",
                "The number of steps does not shrink with the data."
                if plan.recipe.steps is not None
                else "Epochs are of the data as cut: the steps shrink with them.",
                budget(plan),
                *([f"Arms, what is no default: {arms}."] if arms else []),
                f"The paper's gains of DPI over full SFT on the cut task, other models and data: {gain}.",
                printed.INCONSISTENCIES["imbalance"],
                printed.INCONSISTENCIES["consistently"],
                INTERVALS,
            ),
            findings=self._findings(preset, low, high, shares),
        )

    def _scores(
        self, results: Results, method: str, scarce: str, share: float
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of every seed: the cut task's score, and the mean of the others'."""
        preset, own = results.preset, results.preset.tasks[scarce]
        rest = [
            spec
            for spec in access.specs(preset, access.imbalance_plan(preset, self.name).tasks)
            if spec != own
        ]
        runs = [self.run(preset, method, scarce, share, seed) for seed in preset.seeds]
        others = [math.fsum(results.percent(run, spec) for spec in rest) / len(rest) for run in runs]
        return tuple(results.percent(run, own) for run in runs), tuple(others)

    def _findings(
        self,
        preset: Preset,
        low: dict[tuple[str, float], list[tuple[float, ...]]],
        high: dict[tuple[str, float], list[tuple[float, ...]]],
        shares: Sequence[float],
    ) -> list[str]:
        """Means over the cut tasks, at each share; then whether the gain grows as the data shrink. Where there is none at
        the least data, that a loss is smaller claims nothing: both scores end at 0."""
        findings = []
        for method in self.methods(preset)[1:]:
            gains = {share: _over_tasks(low[method, share], low[FULL, share]) for share in shares}
            findings.append(
                compared(
                    method,
                    {f"{100 * share:g} %": gain for share, gain in gains.items() if share < 1},
                    "beats full SFT on the task that was cut",
                    "loses to full SFT on the task that was cut",
                    versus="full SFT",
                    everywhere="at every share",
                    measure="mean over the cut tasks",
                )
            )
            findings.append(
                compared(
                    method,
                    {
                        f"{100 * share:g} %": _over_tasks(high[method, share], high[FULL, share])
                        for share in shares
                        if share < 1
                    },
                    "beats full SFT on the tasks with all their data",
                    "loses to full SFT on the tasks with all their data",
                    versus="full SFT on the tasks with all their data",
                    everywhere="at every share",
                    measure="mean over the others",
                    claim=False,
                )
            )
            least, most = gains[shares[-1]], gains[shares[0]]
            there = summary(least)
            gained = there.excludes_zero and there.mean > 0
            findings.append(
                compared(
                    f"The gain of {method} over full SFT"
                    if gained
                    else f"The difference of {method} from full SFT",
                    {"": [x - y for x, y in zip(least, most)]},
                    f"is larger at {100 * shares[-1]:g} % of the data than at {100 * shares[0]:g} %",
                    f"is smaller at {100 * shares[-1]:g} % of the data than at {100 * shares[0]:g} %",
                    versus=f"that at {100 * shares[0]:g} % of the data",
                    measure="difference of the two",
                    claim=gained,
                )
            )
        return findings


def _over_tasks(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> list[float]:
    """Of every seed: the difference, averaged over the tasks."""
    seeds = zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
    return [math.fsum(x - y for x, y in zip(our, their)) / len(our) for our, their in seeds]
