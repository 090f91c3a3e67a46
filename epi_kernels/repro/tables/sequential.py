"""One task after the other: CPI-FT's Table 2 and EPI's forgetting rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

from epi_kernels.repro import published_values as printed
from epi_kernels.repro.methods.config import Epi, Ewc, PcGrad, Replay, Static
from epi_kernels.repro.preset import Pair, Preset
from epi_kernels.repro.runs import Run
from epi_kernels.repro.tables import access, paper, plans
from epi_kernels.repro.tables.base import Cell, Manifests, Rendered
from epi_kernels.repro.tables.results import (
    Results,
    Rows,
    RunOf,
    alike,
    full_of,
    learned,
    metrics,
    pair_name,
    settled_run,
)
from epi_kernels.repro.tables.words import INTERVALS, compared, everywhere, setting
from epi_kernels.repro.writers.findings import ours

PERCENT = "All scores are in percent of the full mark."
STAGES = (
    "Both stages of a pair start a new learning-rate schedule; the second sees no example of the first task, except by"
    " methods that replay."
)

FISHER = (
    " EWC's diagonal Fisher is the first stage's mean squared gradient of a batch, as clipped, scaled to mean 1; its paper"
    " takes one gradient an example."
)


REPLAYED = (
    " Share, of replay and PCGrad: of every batch's rows, over the steps; they are drawn from all examples of the first task,"
    " and the second has that many rows less in as many steps."
)


def arms_note(preset: Preset) -> str:
    arms = access.sequential_plan(preset, "frontier").arms
    told = "; ".join(f"{name}: {setting(arm.settled)}" for name, arm in arms.items())
    used = [arm.settled.method for arm in arms.values()]
    fisher = FISHER if any(isinstance(one, Ewc) for one in used) else ""
    replayed = REPLAYED if any(isinstance(one, Replay | PcGrad) for one in used) else ""
    alike = "; ".join(f"{name} like {arm.like}" for name, arm in arms.items() if not arm.tuned)
    untuned = f" Not tuned, all else as the chosen setting of another arm: {alike}." if alike else ""
    return f"Arms, what is no default: {told}.{untuned}{fisher}{replayed}"


def methods(preset: Preset, pair: Pair) -> dict[str, RunOf]:
    """Full fine-tuning at each of its learning rates, and every arm."""
    plan = access.sequential_plan(preset, "frontier")
    full = {f"full SFT, lr {lr:g}": full_of(preset, pair, lr) for lr in plan.full_lrs}
    return full | {name: settled_run(preset, pair, name) for name in plan.arms}


def best_full(results: Results, pair: Pair) -> str:
    """Full fine-tuning at the learning rate that learns the second task best."""
    plan = access.sequential_plan(results.preset, "frontier")

    def learns(lr: float) -> float:
        return math.fsum(point.b for point in results.points(pair, full_of(results.preset, pair, lr)))

    return f"full SFT, lr {max(plan.full_lrs, key=learns):g}"


def all_adapted(preset: Preset, table: str) -> list[Run]:
    plan = access.sequential_plan(preset, table)
    return [run for pair in plan.pairs for run in plans.adapted(preset, pair, preset.seeds)]


class Changes:
    name = "cpift-2"
    title = "What the second task costs the first"
    source = "CPI-FT, Table 2"

    def runs(self, preset: Preset) -> Sequence[Run]:
        return all_adapted(preset, self.name)

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        results = Results.of(self, preset, found)
        rows = Rows(results)
        pairs = access.sequential_plan(preset, self.name).pairs
        for pair in pairs:
            before = results.points(pair, learned(preset, pair))
            for name, run_of in methods(preset, pair).items():
                after = results.points(pair, run_of)
                changes = [
                    Cell(
                        values=tuple(x.a - y.a for x, y in zip(after, before)),
                        signed=True,
                        paper=self._printed(preset, pair, name, first=True),
                    ),
                    Cell(
                        values=tuple(x.b - y.b for x, y in zip(after, before)),
                        signed=True,
                        paper=self._printed(preset, pair, name, first=False),
                    ),
                ]
                start = Cell(values=tuple(point.a for point in before))
                rows.add(pair_name(pair), name, start, *changes, runs=map(run_of, preset.seeds))
        tasks = plans.sequential_tasks(preset)
        return rows.rendered(
            self,
            ["first → second", "method", "first, before", "first, change", "second, change"],
            notes=(
                metrics(tasks),
                PERCENT,
                "Change: the score after the second stage less that before it, seed by seed.",
                "CPI-FT with one task a stage is a static mask of the largest |theta - theta_0| of the first stage: the"
                " arms called static by delta. The paper does not say how its multi-stage SFT differs from full SFT when"
                " the tasks come in sequence anyway, so it has no row.",
                STAGES,
                arms_note(preset),
                printed.INCONSISTENCIES["scale"],
                *paper.not_comparable(preset, tasks, TABLE2_PRINTS),
                INTERVALS,
            ),
            findings=self._findings(results, pairs),
        )

    def _printed(self, preset: Preset, pair: Pair, method: str, first: bool) -> float | None:
        """Table 2's change, where the pair, the model and the method are the paper's."""
        specs = preset.tasks[pair.first], preset.tasks[pair.second]
        if not (all(map(paper.same_task, specs)) and plans.first_model(preset) == TABLE2_MODEL):
            return None
        if not paper.same_model(preset, TABLE2_MODEL):
            return None
        arms = access.sequential_plan(preset, self.name).arms
        arm = arms[method].settled.method if method in arms else None
        in_paper = printed.FULL if arm is None else printed.CPIFT
        if arm is not None and not (isinstance(arm, Static) and arm.by == "delta"):
            return None
        row = printed.TABLE2[in_paper]
        match [spec.kind for spec in specs]:
            case ["gsm8k", "alpaca"]:
                return row.a_then_b_a if first else row.a_then_b_b
            case ["alpaca", "gsm8k"]:
                return row.b_then_a_b if first else row.b_then_a_a
        return None

    def _findings(self, results: Results, pairs: Sequence[Pair]) -> tuple[str, ...]:
        """Full fine-tuning's loss, and every arm's price on the second task against its best learning rate."""
        preset = results.preset
        names = [(pair.first, pair.second) for pair in pairs]
        lost, prices = {}, {}
        for pair in pairs:
            full = results.points(pair, methods(preset, pair)[best_full(results, pair)])
            before = results.points(pair, learned(preset, pair))
            lost[pair_name(pair)] = [x.a - y.a for x, y in zip(full, before)]
            for arm in access.sequential_plan(preset, self.name).arms:
                own = results.points(pair, settled_run(preset, pair, arm))
                prices.setdefault(arm, {})[pair_name(pair)] = [x.b - y.b for x, y in zip(own, full)]
        where = everywhere(names)
        best = "full SFT at the learning rate that learns the second task best"
        first = compared(
            f"{best[0].upper()}{best[1:]}",
            lost,
            "gains on the first task",
            "loses on the first task",
            versus="the model before the second stage",
            everywhere=where,
            measure="change",
            claim=False,
        )
        return first, *(
            compared(
                arm,
                places,
                "learns the second task better than full SFT at its best rate",
                "learns the second task less well than full SFT at its best rate",
                versus="full SFT at its best rate on the second task",
                everywhere=where,
                measure="score on the second",
                claim=False,
            )
            for arm, places in prices.items()
        )


class ForgettingRate:
    name = "epi-forgetting"
    title = "Forgetting rate"
    source = "EPI, forgetting rate"

    def runs(self, preset: Preset) -> Sequence[Run]:
        return all_adapted(preset, self.name)

    def lost(self, results: Results, pair: Pair, run_of: RunOf) -> tuple[float, ...]:
        """Points of the first task's score that the second stage took, of every seed."""
        before = results.points(pair, learned(results.preset, pair))
        after = results.points(pair, run_of)
        return tuple(x.a - y.a for x, y in zip(before, after))

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        results = Results.of(self, preset, found)
        rows = Rows(results)
        plan = access.sequential_plan(preset, self.name)
        rates: dict[str, tuple[float, ...]] = {}
        for name in methods(preset, plan.pairs[0]):
            of_pairs = [self.lost(results, pair, methods(preset, pair)[name]) for pair in plan.pairs]
            rates[name] = tuple(math.fsum(seed) / len(seed) for seed in zip(*of_pairs))
            runs = [methods(preset, pair)[name](seed) for pair in plan.pairs for seed in preset.seeds]
            rows.add(name, *(Cell(values=one) for one in of_pairs), Cell(values=rates[name]), runs=runs)
        return rows.rendered(
            self,
            ["method", *map(pair_name, plan.pairs), "forgetting rate"],
            notes=(
                metrics(plans.sequential_tasks(preset)),
                ours(
                    "Forgetting rate (the source does not define it): points of the first task's score, in percent of"
                    " the full mark, that are lost by learning the second, averaged over the pairs. It says nothing of"
                    " how well the second was learned: a method that learns nothing forgets nothing. `frontier` compares"
                    " at equal scores on the second."
                ),
                STAGES,
                arms_note(preset),
                f"The source's rate on GSM8K, not comparable: {paper.listed(printed.EPI_FORGETTING)}. {printed.EPI_SOURCE}",
                INTERVALS,
            ),
            findings=self._findings(preset, rates),
        )

    def _findings(self, preset: Preset, rates: dict[str, tuple[float, ...]]) -> tuple[str, ...]:
        """Whether an evolving mask held against a static one is said where ratio and learning rate are the same: less
        learned is less forgotten."""
        arms = access.sequential_plan(preset, self.name).arms
        evolving = [name for name, arm in arms.items() if isinstance(arm.settled.method, Epi)]
        static = [name for name, arm in arms.items() if isinstance(arm.settled.method, Static)]
        full = [name for name in rates if name not in arms]
        return tuple(
            compared(
                name,
                {"": [y - x for x, y in zip(rates[name], rates[rival])]},
                f"forgets less than {rival}",
                f"forgets more than {rival}",
                versus=rival,
                measure="points fewer lost",
                claim=rival in static and alike(arms[name].settled, arms[rival].settled),
            )
            for name in evolving
            for rival in [*full, *static]
        )


TABLE2_MODEL = "LLaMA-2-7B"
TABLE2_PRINTS = (
    f"{TABLE2_MODEL}, GSM8K then Alpaca (GSM8K, Alpaca), Alpaca then GSM8K (Alpaca, GSM8K): "
    + "; ".join(
        f"{paper.NAMES.get(name, name)} {row.a_then_b_a:+g}, {row.a_then_b_b:+g}, {row.b_then_a_b:+g}, {row.b_then_a_a:+g}"
        for name, row in printed.TABLE2.items()
    )
)
