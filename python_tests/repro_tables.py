"""Made-up manifests and tables, for the tests of what is written from them."""

from __future__ import annotations

from epi_kernels.repro import runs
from epi_kernels.repro.config import ModelSpec, Recipe, TaskSpec
from epi_kernels.repro.manifest import Bytes, Manifest
from epi_kernels.repro.methods.config import Epi, Full, Method
from epi_kernels.repro.preset import Preset
from epi_kernels.repro.tables.base import Cell, Figure, Manifests, Rendered
from epi_kernels.repro.writers import failed, held, ours, scale

SEEDS = (1, 2, 3)
SUMS, STRINGS = TaskSpec(kind="sums"), TaskSpec(kind="strings")
LEARN, ADAPT = Recipe(lr=1e-3, steps=400, batch=40), Recipe(lr=7e-4, steps=150, batch=40)
MODEL = ModelSpec(config={"model_type": "llama", "hidden_size": 64, "tie_word_embeddings": True})
PRESET = Preset(name="tiny", seeds=SEEDS, models={"llama": MODEL}, tasks={"sums": SUMS, "strings": STRINGS})


def stage_b(method: Method, seed: int) -> runs.Train:
    first = runs.Train(
        before=runs.Base(model=MODEL, recipe=LEARN),
        tasks=(SUMS,), evaluate=(SUMS, STRINGS), recipe=LEARN, method=Full(optimizer="epi"), seed=seed,
    )  # fmt: skip
    return runs.Train(
        before=first, tasks=(STRINGS,), evaluate=(SUMS, STRINGS), recipe=ADAPT, method=method, seed=seed
    )


def manifest(
    run: runs.Run, seed: int, scores: dict[str, float], commit: str = "0123456789abcdef"
) -> Manifest:
    return Manifest(
        key=runs.key(run), run=run, seed=seed, commit=commit, versions={"torch": "2.13.0"},
        machine={"cpu": "A <quick> CPU", "cores": 2}, finished="2031-02-03T04:05:06Z", seconds=20.0, scores=scores,
        bytes=Bytes(parameters=1000, weights=4000, optimizer={"total": 8125}),
        series={"loss": [0.123456789, {"step": 3, "loss": 1 / 3}], "drift": [1.0] * 50},
    )  # fmt: skip


def manifests() -> dict[str, Manifest]:
    found = [
        manifest(stage_b(method, seed), seed, {"sums": base + 10 * seed + 1 / 3, "strings": 50.0})
        for method, base in ((Full(), 5.0), (Epi(ratio=0.2), 30.0))
        for seed in SEEDS
    ]
    return {one.key: one for one in found}


def draw(figure) -> None:
    figure.add_subplot().plot([0, 1], [1, 0])


def render(preset: Preset, found: Manifests, names=("retention", "memory")) -> list[Rendered]:
    """A table as those of the package: only from manifests."""

    def keys(method: Method) -> tuple[str, ...]:
        return tuple(runs.key(stage_b(method, seed)) for seed in preset.seeds)

    def scores(method: Method) -> tuple[float, ...]:
        return tuple(found[key].scores["sums"] for key in keys(method))

    full, epi = scores(Full()), scores(Epi(ratio=0.2))
    gain = tuple(a - b for a, b in zip(epi, full))
    retention = Rendered(
        "retention", "What is left of A & B", ("method", "A after B, %", "gain"),
        (("full_sft | 100 %", Cell(full), ""), ("EPI", Cell(epi, note="a note"), Cell(gain, signed=True))),
        notes=(ours("the gain is a difference."),),
        figures=(Figure("retention-by-method", "What is left", draw, (3.0, 2.0)),),
        findings=(scale("a model of 1,000 parameters."), failed("nothing."), held("<EPI> keeps more.")),
        runs=(keys(Full()), keys(Epi(ratio=0.2))),
    )  # fmt: skip
    memory = Rendered("memory", "Memory", ("optimizer", "bytes"), (("ours", Cell((8.125,), digits=3)),))
    return [one for one in (retention, memory) if one.name in names]
