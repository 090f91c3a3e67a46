"""The search beyond the papers: does an isolation beat a static mask, EWC and WiSE-FT at the same score on the second?"""

from __future__ import annotations

from collections.abc import Sequence

from epi_kernels.repro.methods.config import Epi, Ewc, Static, Window
from epi_kernels.repro.preset import Preset
from epi_kernels.repro.runs import Run
from epi_kernels.repro.statistics import paired, summary
from epi_kernels.repro.tables import access, plans
from epi_kernels.repro.tables.access import NoPlan
from epi_kernels.repro.tables.base import Cell, Manifests, Rendered
from epi_kernels.repro.tables.frontier import DEFINITION, OVER_WISE, wise_runs
from epi_kernels.repro.tables.results import Results, Rows, gains, metrics, pair_name, settled_run
from epi_kernels.repro.tables.sequential import PERCENT, all_adapted, arms_note
from epi_kernels.repro.tables.words import INTERVALS
from epi_kernels.repro.writers.findings import failed, held

BYTES, SEEDS = 2.35, 5  # the criterion, decided before any search
ISOLATIONS, RIVALS = (Epi, Window), (Static, Ewc)


class Beyond:
    name = "beyond"
    title = "Isolation against a static mask, EWC and WiSE-FT"
    source = "ours"

    def arms(self, preset: Preset, methods: tuple[type, ...]) -> list[str]:
        arms = access.sequential_plan(preset, self.name).arms
        return [name for name, arm in arms.items() if isinstance(arm.settled.method, methods)]

    def runs(self, preset: Preset) -> Sequence[Run]:
        if not (self.arms(preset, ISOLATIONS) and self.arms(preset, (Static,)) and self.arms(preset, (Ewc,))):
            raise NoPlan(
                f"--table {self.name}: preset {preset.name} has not an evolving, a static and an EWC arm in `sequential`"
            )
        return all_adapted(preset, self.name) + wise_runs(preset, self.name)

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        results = Results.of(self, preset, found)
        rows, plan = Rows(results), access.sequential_plan(preset, self.name)
        rivals, met, missed = self.arms(preset, RIVALS), [], []
        for arm in self.arms(preset, ISOLATIONS):
            size = state_bytes(results, arm)
            beats = size is not None and size <= BYTES and len(preset.seeds) >= SEEDS
            for pair in plan.pairs:
                run_of = settled_run(preset, pair, arm)
                ours = gains(results.over_full(pair, run_of))
                cells = []
                for rival in rivals:
                    theirs = gains(results.over_full(pair, settled_run(preset, pair, rival)))
                    difference = paired(ours, theirs)
                    beats &= difference.excludes_zero and difference.mean > 0
                    values = tuple(x - y for x, y in zip(ours, theirs))
                    cells.append(Cell(values=values, signed=True))
                over_wise = gains(results.over_interpolated(pair, run_of))
                beats &= summary(over_wise).excludes_zero and summary(over_wise).mean > 0
                rows.add(
                    pair_name(pair),
                    arm,
                    *cells,
                    Cell(values=over_wise, signed=True),
                    "" if size is None else f"{size:.3f}",
                    runs=map(run_of, preset.seeds),
                )
            (met if beats else missed).append(arm)
        return rows.rendered(
            self,
            [
                "first → second",
                "arm",
                *(f"over {rival}" for rival in rivals),
                "over WiSE-FT",
                "bytes/parameter",
            ],
            notes=(
                metrics(plans.sequential_tasks(preset)),
                PERCENT,
                DEFINITION,
                "Over an arm: difference of the two arms' dA@B, seed by seed.",
                OVER_WISE,
                criterion(),
                arms_note(preset),
                INTERVALS,
            ),
            findings=[
                *(held(f"{arm} meets the criterion of `beyond`: {criterion()}") for arm in met),
                *(
                    [failed(f"{', '.join(missed)}: the criterion of `beyond` is not met. {criterion()}")]
                    if missed
                    else []
                ),
            ],
        )


def criterion() -> str:
    return (
        "Criterion, decided beforehand: dA@B above that of every static mask and of EWC and above WiSE-FT's frontier on"
        f" every pair, each 95 % interval without 0, on at least {SEEDS} seeds, with at most {BYTES:g} bytes of"
        " optimizer state a parameter."
    )


def state_bytes(results: Results, arm: str) -> float | None:
    """Bytes a parameter, of the arm's largest run."""
    preset = results.preset
    sizes = []
    for pair in access.sequential_plan(preset, "beyond").pairs:
        for seed in preset.seeds:
            held_bytes = results.manifest(settled_run(preset, pair, arm)(seed)).bytes
            if held_bytes is None:
                return None
            sizes.append(held_bytes.optimizer["total"] / held_bytes.parameters)
    return max(sizes)
