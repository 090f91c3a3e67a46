"""What is kept of the first task at the same score on the second: dA@B, against two frontiers without any method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from epi_kernels.report import figures
from epi_kernels.repro.methods.config import Epi, Inverted, RandomMask
from epi_kernels.repro.preset import Pair, Preset, Try
from epi_kernels.repro.runs import Run
from epi_kernels.repro.statistics import summary
from epi_kernels.repro.tables import access, plans
from epi_kernels.repro.tables.base import Cell, Figure, Manifests, Rendered
from epi_kernels.repro.tables.results import (
    ISOLATION,
    Results,
    Rows,
    RunOf,
    alike,
    full_of,
    gains,
    learned,
    metrics,
    pair_name,
    settled_run,
    wised,
)
from epi_kernels.repro.tables.sequential import PERCENT, STAGES, all_adapted, arms_note
from epi_kernels.repro.tables.words import INTERVALS, compared, everywhere
from epi_kernels.repro.writers.findings import failed, ours
from epi_kernels.scores import ABOVE, BELOW, INSIDE, Comparison, Point

DEFINITION = ours(
    "dA@B: a run's score on the first task less what full SFT keeps of it at the same score on the second, read"
    " off straight lines between full SFT's runs of the same seed at several learning rates. Below their range the line"
    " goes on to the model before the second stage, an estimate; above it full SFT is given what its run with the"
    " highest score on the second keeps."
)
OVER_WISE = (
    "Over WiSE-FT: the same against the better of full SFT's runs and the interpolations between the weights before and"
    " after each of them (arXiv 2109.01903), the model before the second stage included."
)
CONTROLS = (RandomMask, Inverted)
LEARNED = 50.0  # percent of the full mark, before the second stage; below it there is little to keep


def where(comparisons: Sequence[Comparison]) -> str:
    """How many runs' B is inside the frontier's range, below it, above it."""
    return "/".join(str(sum(one.where == place for one in comparisons)) for place in (INSIDE, BELOW, ABOVE))


def unlearned(results: Results, pair: Pair) -> list[str]:
    """A finding where the first stage left too little to keep."""
    reached = summary([point.a for point in results.points(pair, learned(results.preset, pair))]).mean
    if reached >= LEARNED:
        return []
    return [
        failed(
            f"On {pair_name(pair)} the first task was hardly learned ({reached:.1f} % before the second stage): what is"
            " kept of it says little."
        )
    ]


def against_rivals(
    arms: Mapping[str, Try], over_full: Mapping[str, Mapping[str, Sequence[float]]], directions: str
) -> list[str]:
    """The first EPI arm against every rival and control: better than full SFT alone may be the moments that it keeps,
    or no more than others reach. What EPI does not win counts against it. A win claims nothing, since ratios, rates
    and how well the tries suit a method differ, but over a control of its own ratio and rate, which then stands for
    its kind."""
    epi = next((name for name, one in arms.items() if isinstance(one.method, Epi)), None)
    if epi is None:
        return []
    controls = {name: one for name, one in arms.items() if isinstance(one.method, CONTROLS)}
    equal = [name for name, one in controls.items() if alike(one, arms[epi])]
    told = {type(controls[name].method) for name in equal}
    rivals = [
        name
        for name, one in arms.items()
        if not isinstance(one.method, ISOLATION) and (name in equal or type(one.method) not in told)
    ]
    sentences = []
    for rival in rivals:
        places = {
            place: [x - y for x, y in zip(values, over_full[rival][place], strict=True)]
            for place, values in over_full[epi].items()
        }
        found = [summary(values) for values in places.values()]
        sentences.append(
            compared(
                epi,
                places,
                f"beats {rival} at the same score on the second task",
                f"loses to {rival} at the same score on the second task",
                versus=rival,
                everywhere=directions,
                measure="difference of dA@B",
                claim=rival in equal or not all(one.excludes_zero and one.mean > 0 for one in found),
            )
        )
    return sentences


def wise_runs(preset: Preset, table: str) -> list[Run]:
    plan = access.sequential_plan(preset, table)
    return [
        run for pair in plan.pairs for seed in preset.seeds for run in plans.wise_runs(preset, pair, seed)
    ]


class Frontier:
    def __init__(
        self,
        name: str = "frontier",
        title: str = "Forgetting at the same score on the second task",
        source: str = "ours; the sequential protocol is CPI-FT's section 4",
        notes: tuple[str, ...] = (),
    ) -> None:
        self.name, self.title, self.source, self._notes = name, title, source, notes

    def runs(self, preset: Preset) -> Sequence[Run]:
        return all_adapted(preset, self.name) + wise_runs(preset, self.name)

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        results = Results.of(self, preset, found)
        rows, plan = Rows(results), access.sequential_plan(preset, self.name)
        over_full: dict[str, dict[str, tuple[float, ...]]] = {}
        over_wise: dict[str, dict[str, tuple[float, ...]]] = {}
        for pair in plan.pairs:
            place = pair_name(pair)
            self._add(rows, pair, "before the second stage", learned(preset, pair))
            for lr in plan.full_lrs:
                self._add(rows, pair, f"full SFT, lr {lr:g}", full_of(preset, pair, lr))
            for lr in plan.full_lrs:
                for alpha in plan.alphas:
                    run_of = wised(preset, pair, lr, alpha)
                    label = f"WiSE-FT, alpha {alpha:g} of lr {lr:g}"
                    self._add(rows, pair, label, run_of, results.over_full(pair, run_of))
            for arm in plan.arms:
                run_of = settled_run(preset, pair, arm)
                full, wise = results.over_full(pair, run_of), results.over_interpolated(pair, run_of)
                over_full.setdefault(arm, {})[place] = gains(full)
                over_wise.setdefault(arm, {})[place] = gains(wise)
                self._add(rows, pair, arm, run_of, full, wise)
        directions = everywhere([(pair.first, pair.second) for pair in plan.pairs])
        columns = [
            "first → second",
            "method",
            "first",
            "second",
            "dA@B",
            "over WiSE-FT",
            "inside/below/above",
        ]
        return rows.rendered(
            self,
            columns,
            notes=(
                *self._notes,
                metrics(plans.sequential_tasks(preset)),
                PERCENT,
                DEFINITION,
                OVER_WISE,
                "Arms are compared by the difference of their dA@B, seed by seed.",
                "Inside/below/above: on how many seeds the score on the second is inside full SFT's range, below, above.",
                STAGES,
                arms_note(preset),
                INTERVALS,
            ),
            figures=tuple(self._figure(results, pair, i) for i, pair in enumerate(plan.pairs, 1)),
            findings=[sentence for pair in plan.pairs for sentence in unlearned(results, pair)]
            + [
                compared(
                    arm,
                    places[arm],
                    f"keeps more of the first task than {rival} at the same score on the second",
                    f"keeps less of the first task than {rival} at the same score on the second",
                    versus=rival,
                    everywhere=directions,
                    measure="dA@B",
                    claim=isinstance(plan.arms[arm].settled.method, ISOLATION),
                )
                for rival, places in (("full SFT", over_full), ("WiSE-FT", over_wise))
                for arm in plan.arms
            ]
            + against_rivals({name: arm.settled for name, arm in plan.arms.items()}, over_full, directions),
        )

    def _add(
        self,
        rows: Rows,
        pair: Pair,
        name: str,
        run_of: RunOf,
        full: Sequence[Comparison] = (),
        wise: Sequence[Comparison] = (),
    ) -> None:
        results = rows.results
        points = results.points(pair, run_of)
        rows.add(
            pair_name(pair),
            name,
            Cell(values=tuple(point.a for point in points)),
            Cell(values=tuple(point.b for point in points)),
            Cell(values=gains(full), signed=True) if full else "",
            Cell(values=gains(wise), signed=True) if wise else "",
            where(full) if full else "",
            runs=map(run_of, results.preset.seeds),
        )

    def _figure(self, results: Results, pair: Pair, number: int) -> Figure:
        preset, plan = results.preset, access.sequential_plan(results.preset, self.name)
        before = _centre(results.points(pair, learned(preset, pair)))
        full = sorted(_centre(results.points(pair, full_of(preset, pair, lr))) for lr in plan.full_lrs)
        wise = [
            _centre(results.points(pair, wised(preset, pair, lr, alpha)))
            for lr in plan.full_lrs
            for alpha in plan.alphas
        ]
        arms = {arm: results.points(pair, settled_run(preset, pair, arm)) for arm in plan.arms}

        def draw(figure: Any) -> None:
            axes = figure.subplots()
            figures.plain(axes, f"{pair.second} (second), %", f"{pair.first} (first), %")
            axes.plot(before.b, before.a, "s", color=figures.INK, label="before the second stage")
            axes.plot(
                [p.b for p in full],
                [p.a for p in full],
                "o-",
                color=figures.SOFT,
                label="full SFT, by learning rate",
            )
            axes.plot([p.b for p in wise], [p.a for p in wise], "x", color=figures.SOFT, label="WiSE-FT")
            for index, (arm, points) in enumerate(arms.items()):
                spread_b, spread_a = summary([p.b for p in points]), summary([p.a for p in points])
                axes.errorbar(
                    spread_b.mean,
                    spread_a.mean,
                    xerr=spread_b.sd,
                    yerr=spread_a.sd,
                    fmt="oD^v"[index // len(figures.COLORS) % 4],
                    color=figures.COLORS[index % len(figures.COLORS)],
                    label=arm,
                )
            axes.legend(frameon=False, fontsize=8)

        return Figure(
            name=f"{self.name}-{number}",
            caption=f"{pair_name(pair)}: what is kept of the first task against what is learned of the second,"
            f" mean ± sd over {len(preset.seeds)} seeds. Up and to the right is better.",
            draw=draw,
            size=(7.0, 5.0),
        )


def _centre(points: Sequence[Point]) -> Point:
    return Point(summary([p.b for p in points]).mean, summary([p.a for p in points]).mean)
