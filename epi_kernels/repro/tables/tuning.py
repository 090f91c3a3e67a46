"""What was tried for every arm on the tuning seed, and whether the setting that the tables use is the best of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.preset import Arm, Preset, Try
from epi_kernels.repro.runs import Run
from epi_kernels.repro.tables import access, plans
from epi_kernels.repro.tables.access import NoPlan
from epi_kernels.repro.tables.base import Cell, Manifests, Rendered
from epi_kernels.repro.tables.frontier import DEFINITION
from epi_kernels.repro.tables.results import Results, Rows
from epi_kernels.repro.tables.words import setting
from epi_kernels.repro.writers.findings import failed, held

CRITERIA = {
    "sequential": "the mean over the pairs of dA@B",
    "mixture": "the average over the tasks on 0-10, on the first model",
    "imbalance": "the average over the tasks on 0-10, with all data",
}


class Tried(NamedTuple):
    plan: str
    arm: str
    index: int
    one: Try
    chosen: bool


class Tuning:
    name = "tuning"
    title = "Settings tried on the tuning seed"
    source = "ours"

    def seed(self, preset: Preset) -> int:
        """The tuning seed of `sequential`, 0 without it. Raises ReproError where it is a seed of the tables."""
        seed = preset.sequential.tuning_seed if preset.sequential else 0
        if seed in preset.seeds:
            raise ReproError(
                f"--table {self.name}: preset {preset.name}: seed {seed} is among those of the tables"
            )
        return seed

    def arms(self, preset: Preset) -> dict[str, dict[str, Arm]]:
        """By plan, those with tries of their own. Mixtures come in where an arm was tuned on them at all. Raises
        ReproError."""
        found = {"sequential": preset.sequential.arms} if preset.sequential else {}
        for plan, arms in (
            ("mixture", preset.mixture.arms if preset.mixture else {}),
            ("imbalance", preset.imbalance.arms if preset.imbalance else {}),
        ):
            if any(len(arm.tries) > 1 for arm in arms.values()):
                found[plan] = arms
        if not any(found.values()):
            raise NoPlan(f"--table {self.name}: preset {preset.name} has no arm that was tuned")
        return {plan: {name: arm for name, arm in arms.items() if arm.tuned} for plan, arms in found.items()}

    def tried(self, preset: Preset) -> Iterator[Tried]:
        for plan, arms in self.arms(preset).items():
            for name, arm in arms.items():
                for index, one in enumerate(arm.tries):
                    yield Tried(plan, name, index, one, index == arm.chosen)

    def runs_of(self, preset: Preset, tried: Tried) -> list[Run]:
        """One a pair, or one."""
        seed = self.seed(preset)
        if tried.plan == "sequential":
            pairs = access.sequential_plan(preset, self.name).pairs
            return [plans.adapt(preset, pair, tried.one, seed) for pair in pairs]
        if tried.plan == "mixture":
            return [plans.mixture(preset, tried.one, seed)]
        plan = access.imbalance_plan(preset, self.name)
        return [plans.mixed(plans.base(preset), access.specs(preset, plan.tasks), plan, tried.one, seed)]

    def runs(self, preset: Preset) -> Sequence[Run]:
        runs = [run for tried in self.tried(preset) for run in self.runs_of(preset, tried)]
        if preset.sequential:
            for pair in preset.sequential.pairs:
                seed = self.seed(preset)
                runs += [plans.learn(preset, pair, seed), *plans.full_runs(preset, pair, seed)]
        return runs

    def value(self, results: Results, tried: Tried) -> float:
        """The criterion."""
        preset, runs = results.preset, self.runs_of(results.preset, tried)
        if tried.plan == "sequential":
            pairs, seed = access.sequential_plan(preset, self.name).pairs, self.seed(preset)
            gains = [
                results.frontiers(pair, seed).over_full(results.point(pair, run)).gain
                for pair, run in zip(pairs, runs)
            ]
            return math.fsum(gains) / len(gains)
        if tried.plan == "mixture":
            return results.average(runs[0], plans.mixture_tasks(preset))
        return results.average(runs[0], access.specs(preset, access.imbalance_plan(preset, self.name).tasks))

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        results = Results.of(self, preset, found)
        rows = Rows(replace(results, preset=preset.model_copy(update={"seeds": (self.seed(preset),)})))
        values = {(one.plan, one.arm, one.index): self.value(results, one) for one in self.tried(preset)}
        wrong: list[str] = []
        for one in self.tried(preset):
            value = values[one.plan, one.arm, one.index]
            best = max(v for (plan, arm, _), v in values.items() if (plan, arm) == (one.plan, one.arm))
            if one.chosen and value < best:
                wrong.append(f"{one.arm} ({one.plan}: {value:.2f} chosen, {best:.2f} reached)")
            marks = [*(["chosen"] if one.chosen else []), *(["best"] if value == best else [])]
            runs = self.runs_of(preset, one)
            signed = one.plan == "sequential"
            rows.add(
                one.plan,
                one.arm,
                setting(one.one),
                Cell(values=(value,), signed=signed, digits=2),
                ", ".join(marks),
                runs=runs,
            )
        plans_here = self.arms(preset)
        judged = "; ".join(f"{plan}: {CRITERIA[plan]}" for plan in plans_here)
        return rows.rendered(
            self,
            ["plan", "arm", "setting", "criterion", ""],
            notes=(
                f"Criterion, the same for every arm, the higher the better. {judged}. Seed {self.seed(preset)}, which no other"
                " table uses.",
                *([DEFINITION] if preset.sequential else []),
                *(
                    [
                        f"Full SFT has {len(preset.sequential.full_lrs)} learning rates and is not tuned: all its runs make the"
                        " frontier."
                    ]
                    if preset.sequential
                    else []
                ),
            ),
            findings=[*self._budgets(plans_here), self._choice(wrong), *self._below(values)],
        )

    def _budgets(self, by_plan: dict[str, dict[str, Arm]]) -> list[str]:
        told = []
        for plan, arms in by_plan.items():
            counts = {name: len(arm.tries) for name, arm in arms.items()}
            if len(set(counts.values())) == 1:
                tries = next(iter(counts.values()))
                told.append(held(f"In {plan}, every arm has the same number of tries, {tries}."))
            else:
                listed = ", ".join(f"{name} {count}" for name, count in counts.items())
                told.append(failed(f"In {plan}, the arms have not the same number of tries: {listed}."))
        return told

    def _below(self, values: Mapping[tuple[str, str, int], float]) -> list[str]:
        """Of arms that only lose to full fine-tuning the best is where least is learned: often the lowest rate."""
        best: dict[str, float] = {}
        for (plan, arm, _), value in values.items():
            if plan == "sequential":
                best[arm] = max(value, best.get(arm, value))
        told = ", ".join(f"{arm} ({value:+.2f} at best)" for arm, value in best.items() if value < 0)
        if not told:
            return []
        return [
            failed(
                f"No setting that was tried keeps more of the first task than full SFT at the same score on the second: {told}."
                " Where nothing is learned nothing is lost, and the criterion is 0: a lower learning rate would be"
                " chosen for learning less, so that the grids do not go on there."
            )
        ]

    def _choice(self, wrong: Sequence[str]) -> str:
        if wrong:
            return failed(f"The chosen setting is not the best of those tried for {'; '.join(wrong)}.")
        return held("For every arm the tables use the best setting of those tried on the tuning seed.")
