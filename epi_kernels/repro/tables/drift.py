"""How far the important elements move while a mixture is learned, by the observer "drift"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from epi_kernels.report import figures
from epi_kernels.repro import published_values as printed
from epi_kernels.repro.preset import Preset
from epi_kernels.repro.runs import Run
from epi_kernels.repro.statistics import summary
from epi_kernels.repro.tables import access, plans
from epi_kernels.repro.tables.base import Cell, Figure, Manifests, Rendered
from epi_kernels.repro.tables.results import Results, Rows, series
from epi_kernels.repro.tables.words import INTERVALS, compared
from epi_kernels.repro.writers.findings import ours

ALL = "all"  # the observer's name for all kinds of parameter together
OVERLAPS = {"from_start_other": "with the start", "ceiling": "noise ceiling", "chance": "chance"}
Points = list[list[dict[str, Any]]]  # of every seed, the observer's points


class Drift:
    name = "drift"
    title = "How far the important elements move during training"
    source = "EPI, drift of importance"

    def run(self, preset: Preset, model: str, seed: int) -> Run:
        from epi_kernels.repro.measure import ask  # with torch, which naming other tables' runs does without

        plan = access.drift_plan(preset, self.name)
        return plans.drift_run(preset, model, seed, (ask("drift", every=plan.every, ratios=plan.ratios),))

    def runs(self, preset: Preset) -> Sequence[Run]:
        access.drift_plan(preset, self.name)
        return [self.run(preset, model, seed) for model in preset.models for seed in preset.seeds]

    def points(self, results: Results, model: str, ratio: float) -> Points:
        runs = [self.run(results.preset, model, seed) for seed in results.preset.seeds]
        return [series(results, run, "drift")["ratios"][str(ratio)] for run in runs]

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        results, plan = Results.of(self, preset, found), access.drift_plan(preset, self.name)
        rows, beyond_noise, known = Rows(results), {}, {}
        for model in preset.models:
            for ratio in plan.ratios:
                of_seeds = known[model, ratio] = self.points(results, model, ratio)
                runs = [self.run(preset, model, seed) for seed in preset.seeds]
                for kind in of_seeds[0][-1]["ceiling"]:
                    rows.add(
                        model,
                        f"{100 * ratio:g} %",
                        kind,
                        _percent(of_seeds, "share", kind),
                        _percent(of_seeds, "from_start", kind),
                        _percent(of_seeds, "from_start_other", kind),
                        _percent(of_seeds, "ceiling", kind, first=True),
                        _percent(of_seeds, "ceiling", kind),
                        _percent(of_seeds, "chance", kind),
                        runs=runs,
                    )
                beyond_noise[f"{model} at p = {100 * ratio:g} %"] = [
                    100
                    * (
                        min(points[0]["ceiling"][ALL], points[-1]["ceiling"][ALL])
                        - points[-1]["from_start_other"][ALL]
                    )
                    for points in of_seeds
                ]
        last = known[plans.first_model(preset), plan.ratios[0]][0][-1]["step"]
        high, low = printed.EPI_DRIFT
        return rows.rendered(
            self,
            [
                "model",
                "p",
                "parameters",
                "in the set, %",
                "with the start, same batches",
                "with the start, other batches",
                "noise ceiling, start",
                "noise ceiling, end",
                "chance",
            ],
            notes=(
                f"Jaccard overlap in percent of the sets of the p most important elements before training and after {last}"
                " steps of full SFT on the mixture. Importance: mean squared gradient of fixed batches, min-max within"
                " each tensor, selected globally.",
                ours(
                    "Noise ceiling: the overlap of two sets from disjoint batches at the same weights; chance: of two"
                    " random sets of the same sizes. The overlap with the start is to be held against the ceiling, not"
                    " against 100."
                ),
                f"The source has the overlap fall from {high:g} % to {low:g} % and states no ceiling. {printed.EPI_SOURCE}",
                INTERVALS,
            ),
            figures=(
                *(self._by_model(preset, ratio, known) for ratio in plan.ratios),
                self._by_kind(preset, plan.ratios[-1], known),
            ),
            findings=[
                compared(
                    "Importance",
                    beyond_noise,
                    "moves further than noise explains",
                    "moves less than noise would have it",
                    versus="noise",
                    everywhere="on every model and at every p",
                    measure="points below the lower noise ceiling",
                )
            ],
        )

    def _by_model(self, preset: Preset, ratio: float, known: dict[tuple[str, float], Points]) -> Figure:
        def draw(figure: Any) -> None:
            grid = figure.subplots(1, len(preset.models), sharey=True, squeeze=False)[0]
            for axes, model in zip(grid, preset.models):
                figures.plain(axes, "step", "Jaccard" if axes is grid[0] else "")
                axes.set_title(model, fontsize=10)
                for (name, label), color in zip(OVERLAPS.items(), figures.COLORS):
                    _line(axes, known[model, ratio], name, ALL, label, color)
                axes.set_ylim(0, 1.02)
            grid[0].legend(frameon=False, fontsize=8)

        return Figure(
            name=f"drift-{100 * ratio:g}",
            caption=f"Overlap of the {100 * ratio:g} % most important elements with those at the start, on other batches,"
            f" with its noise ceiling and chance; bands: ± sd over {len(preset.seeds)} seeds.",
            draw=draw,
            size=(max(5.0, 3.5 * len(preset.models)), 4.0),
        )

    def _by_kind(self, preset: Preset, ratio: float, known: dict[tuple[str, float], Points]) -> Figure:
        model = plans.first_model(preset)
        of_seeds = known[model, ratio]

        def draw(figure: Any) -> None:
            kinds = [kind for kind in of_seeds[0][-1]["ceiling"] if kind != ALL]
            columns = min(4, len(kinds))
            grid = figure.subplots(
                -(-len(kinds) // columns), columns, sharex=True, sharey=True, squeeze=False
            )
            cells = list(grid.flat)
            for axes, kind in zip(cells, kinds):
                figures.plain(axes, "step", "Jaccard")
                axes.set_title(kind, fontsize=9)
                for (name, label), color in zip(OVERLAPS.items(), figures.COLORS):
                    _line(axes, of_seeds, name, kind, label, color)
                axes.set_ylim(0, 1.02)
            for axes in cells[len(kinds) :]:
                axes.set_visible(False)
            cells[0].legend(frameon=False, fontsize=7)

        return Figure(
            name="drift-by-kind",
            caption=f"{model}: the same at p = {100 * ratio:g} %, by kind of parameter.",
            draw=draw,
            size=(9.0, 6.0),
        )


def _percent(of_seeds: Points, name: str, kind: str, first: bool = False) -> Cell:
    return Cell(values=tuple(100 * points[0 if first else -1][name].get(kind, 0.0) for points in of_seeds))


def _line(axes: Any, of_seeds: Points, name: str, kind: str, label: str, color: str) -> None:
    steps = [point["step"] for point in of_seeds[0]]
    found = [summary([point[name].get(kind, 0.0) for point in at]) for at in zip(*of_seeds)]
    mean, sd = [one.mean for one in found], [one.sd for one in found]
    style = "-" if name == "from_start_other" else "--"
    axes.plot(steps, mean, style, color=color, label=label)
    axes.fill_between(
        steps, [m - s for m, s in zip(mean, sd)], [m + s for m, s in zip(mean, sd)], color=color, alpha=0.2
    )
