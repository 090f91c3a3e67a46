"""EPI's settings, one after the other: ratio, interval, beta, normalisation. Each against full fine-tuning's frontier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from epi_kernels.report import figures
from epi_kernels.repro.methods.config import Epi, Window
from epi_kernels.repro.preset import Pair, Preset, Sweep, Try
from epi_kernels.repro.runs import Run
from epi_kernels.repro.statistics import summary
from epi_kernels.repro.tables import access, plans
from epi_kernels.repro.tables.base import Cell, Figure, Manifests, Rendered
from epi_kernels.repro.tables.frontier import DEFINITION, where
from epi_kernels.repro.tables.results import Results, Rows, RunOf, gains, metrics, pair_name
from epi_kernels.repro.tables.sequential import PERCENT, STAGES
from epi_kernels.repro.tables.words import INTERVALS, compared, setting


def swept(preset: Preset, table: str) -> tuple[Pair, Try, Epi]:
    """The first pair, the settled arm that is varied, and its method. Raises NoPlan."""
    sweep = access.sweep_plan(preset, table)
    plan = access.sequential_plan(preset, table)
    one = plan.arms[sweep.of].settled
    assert isinstance(one.method, Epi), "a preset takes no other arm"
    return plan.pairs[0], one, one.method


def varied(one: Try, **changes: Any) -> Try:
    """The arm with other settings of its method."""
    return one.model_copy(update={"method": one.method.model_copy(update=changes)})


class Variants:
    """A table of variants of one arm: a row each, on the first pair, with dA@B."""

    name: str
    title: str
    source: str
    column: str
    logarithmic = True  # the figure's axis

    def variants(self, preset: Preset) -> dict[str, Try]:
        """Label -> setting; the arm as it is among them. Raises ReproError."""
        raise NotImplementedError

    def positions(self, preset: Preset) -> dict[str, float]:
        """Where labels stand on the figure's axis; none: no figure."""
        return {}

    def notes(self) -> tuple[str, ...]:
        return ()

    def runs(self, preset: Preset) -> Sequence[Run]:
        variants = self.variants(preset)
        pair, _, _ = swept(preset, self.name)
        runs: list[Run] = []
        for seed in preset.seeds:
            runs += [plans.learn(preset, pair, seed), *plans.full_runs(preset, pair, seed)]
            runs += [plans.adapt(preset, pair, one, seed) for one in variants.values()]
        return runs

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        results = Results.of(self, preset, found)
        rows, (pair, settled, _) = Rows(results), swept(preset, self.name)
        over_full: dict[str, tuple[float, ...]] = {}
        for label, one in self.variants(preset).items():
            run_of: RunOf = lambda seed, one=one: plans.adapt(preset, pair, one, seed)  # noqa: E731
            points, comparisons = results.points(pair, run_of), results.over_full(pair, run_of)
            over_full[label] = gains(comparisons)
            rows.add(
                label,
                Cell(values=tuple(point.a for point in points)),
                Cell(values=tuple(point.b for point in points)),
                Cell(values=over_full[label], signed=True),
                where(comparisons),
                runs=map(run_of, preset.seeds),
            )
        as_it_is = next(label for label, one in self.variants(preset).items() if one == settled)
        place = pair_name(pair)
        return rows.rendered(
            self,
            [self.column, "first", "second", "dA@B", "inside/below/above"],
            notes=(
                metrics(plans.sequential_tasks(preset)),
                PERCENT,
                f"{place}. All else as the arm {access.sweep_plan(preset, self.name).of}: {setting(settled)}.",
                DEFINITION,
                *self.notes(),
                STAGES,
                INTERVALS,
            ),
            figures=self._figures(preset, over_full, place),
            findings=[
                compared(
                    f"{self.column} {label}",
                    {"": values},
                    f"keeps more than full SFT at the same score on the second task ({place})",
                    f"keeps less than full SFT at the same score on the second task ({place})",
                    versus="full SFT",
                    measure="dA@B",
                )
                for label, values in over_full.items()
            ]
            + [
                compared(
                    f"{self.column} {label}",
                    {"": [x - y for x, y in zip(values, over_full[as_it_is])]},
                    f"beats {as_it_is} ({place})",
                    f"loses to {as_it_is} ({place})",
                    versus=as_it_is,
                    measure="difference of dA@B",
                    claim=False,
                )
                for label, values in over_full.items()
                if label != as_it_is
            ],
        )

    def _figures(
        self, preset: Preset, over_full: dict[str, tuple[float, ...]], place: str
    ) -> tuple[Figure, ...]:
        at = self.positions(preset)
        if len(at) < 2:
            return ()
        points = sorted((x, summary(over_full[label])) for label, x in at.items())

        def draw(figure: Any) -> None:
            axes = figure.subplots()
            figures.plain(axes, self.column, "dA@B, points")
            axes.axhline(0, color=figures.SOFT, linewidth=1)
            axes.errorbar(
                [x for x, _ in points],
                [one.mean for _, one in points],
                yerr=[one.interval.high - one.mean if one.interval else 0 for _, one in points],
                fmt="o-",
                color=figures.COLORS[0],
            )
            if self.logarithmic:
                axes.set_xscale("log")
                axes.set_xticks([x for x, _ in points], [f"{x:g}" for x, _ in points])
                axes.minorticks_off()

        caption = f"{place}: dA@B by {self.column}, with 95 % intervals, n = {len(preset.seeds)}."
        return (Figure(name=self.name, caption=caption, draw=draw),)


def _sweep(preset: Preset, table: str, *fields: str) -> Sweep:
    return access.sweep_plan(preset, table, *fields)


class Ratio(Variants):
    name, column = "epi-ratio", "isolation ratio"
    title, source = "How much is isolated", "EPI, sensitivity to p; asked for by its referee"

    def ratios(self, preset: Preset) -> list[float]:
        _, _, epi = swept(preset, self.name)
        return sorted({*_sweep(preset, self.name, "ratios").ratios, epi.ratio})

    def variants(self, preset: Preset) -> dict[str, Try]:
        ratios = self.ratios(preset)
        return {f"{100 * p:g} %": varied(swept(preset, self.name)[1], ratio=p) for p in ratios}

    def positions(self, preset: Preset) -> dict[str, float]:
        return {f"{100 * p:g} %": p for p in self.ratios(preset)}


class Interval(Variants):
    name, column = "epi-interval", "mask interval, steps"
    title, source = "How often the mask is refreshed", "EPI, sensitivity to H; asked for by its referee"

    def intervals(self, preset: Preset) -> list[int]:
        _, _, epi = swept(preset, self.name)
        return sorted({*_sweep(preset, self.name, "intervals").intervals, epi.interval})

    def variants(self, preset: Preset) -> dict[str, Try]:
        settled = swept(preset, self.name)[1]
        return {str(steps): varied(settled, interval=steps) for steps in self.intervals(preset)}

    def positions(self, preset: Preset) -> dict[str, float]:
        return {str(steps): steps for steps in self.intervals(preset)}

    def notes(self) -> tuple[str, ...]:
        return ("An interval longer than the stage is a static mask of the carried importance.",)


class Beta(Variants):
    name, column = "epi-beta", "importance"
    title, source = "How slowly importance forgets", "EPI, its smoothing; asked for by its referee"

    def variants(self, preset: Preset) -> dict[str, Try]:
        sweep = _sweep(preset, self.name, "betas", "windows")
        pair, settled, epi = swept(preset, self.name)
        shared = pair.adapt.betas[1]  # of its own, too: what it is that differs from the first row
        betas = sorted({*sweep.betas, shared, *([epi.importance_beta] if epi.importance_beta else [])})
        found = {f"shared with exp_avg_sq, beta {shared:g}": varied(settled, importance_beta=None)}
        found |= {f"own, beta {beta:g}": varied(settled, importance_beta=beta) for beta in betas}
        for steps in sweep.windows:
            method = Window(ratio=epi.ratio, interval=epi.interval, window=steps, carry=epi.carry)
            found[f"mean over the last {steps} steps"] = settled.model_copy(update={"method": method})
        return found

    def notes(self) -> tuple[str, ...]:
        return (
            "The first stage records importance with the beta of exp_avg_sq; an own beta acts from the second stage on.",
            "Where importance is shared, or a window's mean, AdamW's second moments go on in the second stage with it;"
            " beside an importance of its own they start at zero: rows of own importance compare with each other.",
        )


class Normalization(Variants):
    name, column = "epi-normalization", "score"
    title, source = "Scores normalised by layer and raw", "EPI, ablation: layer-normalised against raw scores"

    def variants(self, preset: Preset) -> dict[str, Try]:
        _, settled, epi = swept(preset, self.name)
        plain = {"normalization": "minmax", "scope": "global", "by_block": False}
        found = {
            "min-max by tensor": plain,
            "min-max by transformer block": plain | {"by_block": True},
            "z-score by tensor": plain | {"normalization": "zscore"},
            "raw": plain | {"normalization": "none"},
            "equal share of every tensor": plain | {"scope": "layer"},
        }
        if epi.hysteresis:  # which divides scores, and a z-score may be negative
            del found["z-score by tensor"]
        variants = {label: varied(settled, **changes) for label, changes in found.items()}
        if settled not in variants.values():
            variants["as the arm has it"] = settled
        return variants

    def notes(self) -> tuple[str, ...]:
        return ("The source normalises by layer and selects globally; what a layer is, it does not state.",)
