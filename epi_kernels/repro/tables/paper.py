"""Which of the papers' printed numbers stand beside ours: those of the same model, data and metric, and no others."""

from __future__ import annotations

from collections.abc import Mapping

from epi_kernels.repro import published_values as printed
from epi_kernels.repro.config import TaskSpec
from epi_kernels.repro.preset import Preset
from epi_kernels.repro.runs import Tasks

NAMES = {printed.FULL: "full SFT", printed.CPIFT: "CPI-FT", "epi": "EPI"}  # of printed rows

ROUNDING = (
    "Weights are bfloat16: full SFT and the methods that are AdamW otherwise are stepped by MaskedEMAAdamW at ratio 0, which"
    " rounds stochastically as it does under a mask; rounding to nearest would lose most of their steps. EPI as published"
    " and MoFO round to nearest."
)


def listed(values: Mapping[str, float]) -> str:
    """Printed numbers by method, in a line."""
    return ", ".join(f"{NAMES.get(name, name)} {value:g}" for name, value in values.items())


def same_task(spec: TaskSpec) -> bool:
    """The paper's data in full, by the paper's metric: a judged task with the paper's judge, GPT-4.

    How many answers were judged is not stated, and the judged data sets have no test split in the paper: there `test` may
    say how many.
    """
    judged = printed.FULL_MARKS.get(spec.kind) == printed.JUDGED[1]
    whole = spec.share == 1 and spec.train is None and spec.harness == "own"
    whole = whole and (spec.test is None or judged)
    by_gpt4 = spec.judge is not None and spec.judge.model.lower().startswith("gpt-4")
    return spec.kind in printed.TASKS and whole and (by_gpt4 or not judged)


def same_model(preset: Preset, model: str) -> bool:
    """A checkpoint that the preset calls by the paper's name of it."""
    return model in printed.TABLE1 and preset.models[model].checkpoint is not None


def reason(preset: Preset, tasks: Tasks) -> str | None:
    """Why numbers of the paper do not stand beside ours; None where all of them do."""
    other_models = [model for model in preset.models if not same_model(preset, model)]
    other_tasks = [spec.kind for spec in tasks if not same_task(spec)]
    parts = []
    if other_models:
        parts.append(f"{', '.join(other_models)}: no row in the paper")
    if other_tasks:
        parts.append(f"{', '.join(other_tasks)}: not the paper's data, or not by its metric")
    return "; ".join(parts) or None


def models_note(preset: Preset) -> tuple[str, ...]:
    """Which checkpoints stand under the names; nothing where there are none."""
    named = [
        f"{name}: {spec.checkpoint}" for name, spec in preset.models.items() if spec.checkpoint is not None
    ]
    if not named:
        return ()
    low = any(spec.dtype == "bfloat16" for spec in preset.models.values())
    return (
        f"Checkpoints. {'; '.join(named)}. {printed.INCONSISTENCIES['names']}",
        *([ROUNDING] if low else []),
    )


def not_comparable(preset: Preset, tasks: Tasks, prints: str) -> tuple[str, ...]:
    """A note that marks what is not comparable and says what the paper prints."""
    why = reason(preset, tasks)
    return (f"Not comparable with the paper's numbers ({why}). It prints: {prints}.",) if why else ()


def task_score(preset: Preset, model: str, method: str, spec: TaskSpec) -> float | None:
    """Table 1's score, in the metric's unit."""
    if not (same_model(preset, model) and same_task(spec)):
        return None
    return printed.TABLE1[model][method].tasks[spec.kind]


def average(preset: Preset, model: str, method: str, tasks: Tasks) -> float | None:
    """Table 1's average, recomputed by its own formula to the digits it prints; None unless all its tasks are here and no others."""
    if not same_model(preset, model) or {spec.kind for spec in tasks} != set(printed.TASKS):
        return None
    return round(printed.TABLE1[model][method].recomputed, 2) if all(map(same_task, tasks)) else None


TABLE1_PRINTS = "average, full SFT and CPI-FT: " + "; ".join(
    f"{model} {rows[printed.FULL].average:g} and {rows[printed.CPIFT].average:g}"
    for model, rows in printed.TABLE1.items()
)
