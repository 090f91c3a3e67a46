"""Evolving against static masks, and against those that know nothing: EPI's ablation of its main idea."""

from __future__ import annotations

from collections.abc import Sequence

from epi_kernels.repro.methods.config import Epi, Inverted, PublishedEpi, RandomMask, Static, Window
from epi_kernels.repro.preset import Preset
from epi_kernels.repro.runs import Run
from epi_kernels.repro.tables import access, plans
from epi_kernels.repro.tables.access import NoPlan
from epi_kernels.repro.tables.base import Cell, Manifests, Rendered
from epi_kernels.repro.tables.frontier import DEFINITION
from epi_kernels.repro.tables.results import Results, Rows, gains, metrics, pair_name, settled_run
from epi_kernels.repro.tables.sequential import PERCENT, STAGES, all_adapted, arms_note
from epi_kernels.repro.tables.words import INTERVALS, compared, everywhere

EVOLVING = (Epi, PublishedEpi, Window)
FIXED = (Static, RandomMask, Inverted)


class StaticDynamic:
    name = "epi-static-dynamic"
    title = "Static and evolving masks of the same size"
    source = "EPI, ablation: static against dynamic mask"

    def arms(self, preset: Preset) -> dict[str, float]:
        """Arms with a mask, and its ratio."""
        arms = access.sequential_plan(preset, self.name).arms
        return {
            name: arm.settled.method.ratio
            for name, arm in arms.items()
            if isinstance(arm.settled.method, EVOLVING + FIXED)
        }

    def of(self, preset: Preset, methods: tuple[type, ...]) -> list[str]:
        arms = access.sequential_plan(preset, self.name).arms
        return [name for name in self.arms(preset) if isinstance(arms[name].settled.method, methods)]

    def runs(self, preset: Preset) -> Sequence[Run]:
        if not (self.of(preset, EVOLVING) and self.of(preset, FIXED)):
            raise NoPlan(
                f"--table {self.name}: preset {preset.name} has not both an evolving and a fixed mask in `sequential`"
            )
        return all_adapted(preset, self.name)

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        results = Results.of(self, preset, found)
        rows, pairs = Rows(results), access.sequential_plan(preset, self.name).pairs
        ratios = self.arms(preset)
        over_full: dict[str, dict[str, tuple[float, ...]]] = {}
        for pair in pairs:
            for arm, ratio in ratios.items():
                run_of = settled_run(preset, pair, arm)
                points, gain = results.points(pair, run_of), gains(results.over_full(pair, run_of))
                over_full.setdefault(arm, {})[pair_name(pair)] = gain
                rows.add(
                    pair_name(pair),
                    arm,
                    f"{100 * ratio:g} %",
                    Cell(values=tuple(point.a for point in points)),
                    Cell(values=tuple(point.b for point in points)),
                    Cell(values=gain, signed=True),
                    runs=map(run_of, preset.seeds),
                )
        directions = everywhere([(pair.first, pair.second) for pair in pairs])
        equal = [
            (ours, theirs)
            for ours in self.of(preset, EVOLVING)
            for theirs in self.of(preset, FIXED)
            if ratios[ours] == ratios[theirs]
        ]
        unequal = (
            () if len(set(ratios.values())) == 1 else ("Only masks of the same ratio are compared below.",)
        )
        return rows.rendered(
            self,
            ["first → second", "arm", "ratio", "first", "second", "dA@B"],
            notes=(
                metrics(plans.sequential_tasks(preset)),
                PERCENT,
                DEFINITION,
                "Static by g2: the carried importance's top set; by delta: CPI-FT's core, the largest"
                " |theta - theta_0| of the first stage. Random and inverted masks are controls.",
                STAGES,
                arms_note(preset),
                *unequal,
                INTERVALS,
            ),
            findings=[
                compared(
                    ours,
                    {
                        place: [x - y for x, y in zip(over_full[ours][place], over_full[theirs][place])]
                        for place in over_full[ours]
                    },
                    f"beats {theirs} at the same ratio and the same score on the second task",
                    f"loses to {theirs} at the same ratio and the same score on the second task",
                    versus=theirs,
                    everywhere=directions,
                    measure="difference of dA@B",
                )
                for ours, theirs in equal
            ],
        )
