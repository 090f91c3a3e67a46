"""What tables read of manifests: scores in percent of the full mark, averages over tasks, dA@B."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from epi_kernels.repro.config import TaskSpec
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.manifest import PLAIN, Manifest
from epi_kernels.repro.methods.config import Epi, PublishedEpi, Static, Window
from epi_kernels.repro.preset import Pair, Preset, Try
from epi_kernels.repro.runs import Base, Run, Tasks, base_of, key
from epi_kernels.repro.statistics import Frontiers, normalised_average
from epi_kernels.repro.tables import access, plans
from epi_kernels.repro.tables.base import Cell, Manifests, Rendered, Table
from epi_kernels.repro.tasks import PICTURED, SYNTHETIC, make_task
from epi_kernels.repro.writers.findings import scale
from epi_kernels.scores import Comparison, Point

RunOf = Callable[[int], Run]  # of a seed
ISOLATION = (
    Epi,
    PublishedEpi,
    Static,
    Window,
)  # what the papers say keeps more; the rest are rivals and controls


def metrics(tasks: Sequence[TaskSpec]) -> str:
    """A note that says what the scores are."""
    return "Scores: " + "; ".join(f"{spec.kind}: {make_task(spec).metric}" for spec in tasks) + "."


def pair_name(pair: Pair) -> str:
    return f"{pair.first} → {pair.second}"


@dataclass(frozen=True)
class Results:
    """The manifests of one table's runs, all of them there."""

    preset: Preset
    found: Manifests
    marks: dict[str, float] = field(default_factory=dict, compare=False)  # by kind, as they are asked for

    @classmethod
    def of(cls, table: Table, preset: Preset, found: Manifests) -> Results:
        """Raises ReproError when a run that the table needs has no manifest."""
        missing = [run for run in plans.unique(table.runs(preset)) if key(run) not in found]
        if missing:
            first = missing[0]
            seed = getattr(first, "seed", None)
            at = "" if seed is None else f", seed {seed}"
            tasks = ", ".join(plans.kinds(getattr(first, "tasks", ())))
            on = f" on {tasks}" if tasks else ""
            raise ReproError(
                f"--table {table.name}: {len(missing)} runs have no manifest yet, "
                f"the first is {key(first)} ({first.kind}{on}{at}); let the sweep finish"
            )
        return cls(preset, found)

    def manifest(self, run: Run) -> Manifest:
        return self.found[key(run)]

    def score(self, run: Run, spec: TaskSpec) -> float:
        """In the metric's unit. Raises ReproError when the run was not scored on the task."""
        manifest = self.manifest(run)
        if spec.kind not in manifest.scores:
            raise ReproError(f"run {manifest.key}: its manifest has no score on {spec.kind}")
        return manifest.scores[spec.kind]

    def full_mark(self, spec: TaskSpec) -> float:
        """100 or 10. Raises ReproError for an unknown kind."""
        if spec.kind not in self.marks:
            self.marks[spec.kind] = make_task(spec).full_mark
        return self.marks[spec.kind]

    def percent(self, run: Run, spec: TaskSpec) -> float:
        """Of the full mark."""
        return 100 * self.score(run, spec) / self.full_mark(spec)

    def average(self, run: Run, tasks: Tasks) -> float:
        """Over tasks, 0 to 10."""
        scores = {spec.kind: self.score(run, spec) for spec in tasks}
        return normalised_average(scores, {spec.kind: self.full_mark(spec) for spec in tasks})

    def scale(self) -> str:
        """A finding: what the numbers are of."""
        preset = self.preset
        sizes = []
        for name, spec in preset.models.items():
            size = next(
                (
                    one.bytes.parameters
                    for one in self.found.values()
                    if one.bytes and base_of(one.run).model == spec
                ),
                None,
            )
            sizes.append(name if size is None else f"{name} ({size:,} parameters)")
        synthetic = all(spec.kind in SYNTHETIC | PICTURED for spec in preset.tasks.values())
        tasks = "synthetic tasks" if synthetic else f"tasks {', '.join(preset.tasks)}"
        seeds = "1 seed" if len(preset.seeds) == 1 else f"{len(preset.seeds)} seeds"
        return scale(f"preset {preset.name}: {', '.join(sizes)}; {tasks}; {seeds}.")

    def plain_templates(self) -> tuple[str, ...]:
        """A note: which models were asked in a form that is not their own; nothing where there are none."""
        plain = [
            one.run.model for one in self.found.values() if isinstance(one.run, Base) and one.notes.get(PLAIN)
        ]
        names = [name for name, spec in self.preset.models.items() if spec in plain]
        if not names:
            return ()
        return (
            f"No chat template of its own, so a plain one (### User: ... ### Assistant: ...): {', '.join(names)}.",
        )

    def over_seeds(self, value: Callable[[Run], float], run_of: RunOf) -> tuple[float, ...]:
        return tuple(value(run_of(seed)) for seed in self.preset.seeds)

    # --- a pair of tasks, one after the other ---

    def point(self, pair: Pair, run: Run) -> Point:
        """Scores on the second and the first task of the pair, in percent."""
        tasks = self.preset.tasks
        return Point(self.percent(run, tasks[pair.second]), self.percent(run, tasks[pair.first]))

    def points(self, pair: Pair, run_of: RunOf) -> list[Point]:
        return [self.point(pair, run_of(seed)) for seed in self.preset.seeds]

    def frontiers(self, pair: Pair, seed: int, interpolated: bool = False) -> Frontiers:
        """Full fine-tuning's runs of a seed, with WiSE-FT's where asked for."""
        wise = plans.wise_runs(self.preset, pair, seed) if interpolated else []
        return Frontiers(
            full=tuple(self.point(pair, run) for run in plans.full_runs(self.preset, pair, seed)),
            interpolated=tuple(self.point(pair, run) for run in wise),
            before=self.point(pair, plans.learn(self.preset, pair, seed)),
        )

    def over_full(self, pair: Pair, run_of: RunOf) -> list[Comparison]:
        """dA@B of every seed."""
        return [
            self.frontiers(pair, seed).over_full(self.point(pair, run_of(seed))) for seed in self.preset.seeds
        ]

    def over_interpolated(self, pair: Pair, run_of: RunOf) -> list[Comparison]:
        """dA@B against the better of full fine-tuning and WiSE-FT, of every seed."""
        return [
            self.frontiers(pair, seed, True).over_interpolated(self.point(pair, run_of(seed)))
            for seed in self.preset.seeds
        ]


def series(results: Results, run: Run, observer: str) -> Mapping[str, Any]:
    """What an observer recorded. Raises ReproError when it did not."""
    manifest = results.manifest(run)
    if observer not in manifest.series:
        raise ReproError(f"run {manifest.key}: its manifest has no series of the observer {observer}")
    return manifest.series[observer]


def gains(comparisons: Sequence[Comparison]) -> tuple[float, ...]:
    return tuple(one.gain for one in comparisons)


def settled_run(preset: Preset, pair: Pair, arm: str) -> RunOf:
    """The run of an arm with its chosen setting."""
    chosen = access.sequential_plan(preset, "frontier").arms[arm].settled
    return lambda seed: plans.adapt(preset, pair, chosen, seed)


def alike(one: Try, other: Try) -> bool:
    """Two masks of one ratio, learned at one rate."""
    return (one.lr, getattr(one.method, "ratio", None)) == (other.lr, getattr(other.method, "ratio", None))


def full_of(preset: Preset, pair: Pair, lr: float | None) -> RunOf:
    return lambda seed: plans.full_run(preset, pair, lr, seed)


def wised(preset: Preset, pair: Pair, lr: float, alpha: float) -> RunOf:
    return lambda seed: plans.interpolated(preset, pair, lr, alpha, seed)


def learned(preset: Preset, pair: Pair) -> RunOf:
    return lambda seed: plans.learn(preset, pair, seed)


@dataclass
class Rows:
    """A table's rows with the runs behind each."""

    results: Results
    cells: list[tuple[Cell | str, ...]] = field(default_factory=list)
    keys: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: Cell | str, runs: Iterable[Run] = ()) -> None:
        self.cells.append(cells)
        self.keys.append(tuple(key(run) for run in runs))

    def rendered(
        self,
        table: Table,
        columns: Sequence[str],
        findings: Sequence[str] = (),
        notes: Sequence[str] = (),
        **rest: Any,
    ) -> Rendered:
        return Rendered(
            name=table.name,
            title=table.title,
            columns=tuple(columns),
            rows=tuple(self.cells),
            runs=tuple(self.keys),
            findings=(*findings, self.results.scale()),
            notes=(*notes, *self.results.plain_templates()),
            **rest,
        )
