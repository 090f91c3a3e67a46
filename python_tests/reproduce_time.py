"""How long a preset takes on a GPU that nobody has at hand: counted from its runs, by the arithmetic its comment states."""

from __future__ import annotations

from functools import cache

import torch

from epi_kernels.repro.config import ModelSpec, TaskSpec
from epi_kernels.repro.evaluate import encode_task
from epi_kernels.repro.models import new_model, tokenizer_of
from epi_kernels.repro.pictures import EMBEDDINGS
from epi_kernels.repro.preset import Preset
from epi_kernels.repro.runs import Base, Interpolate, Run, Train, base_of
from epi_kernels.repro.stages import CHARACTERS
from epi_kernels.repro.sweep import Plan
from epi_kernels.repro.tables import TABLES
from epi_kernels.repro.tasks.synthetic.pictured import captioned
from epi_kernels.repro.workshop import examples_of

HOST_S, FLOPS = 0.010, 20e12  # of a training step; a second, float32
LEAF_S, KEPT_S, TOP_SETS_S = 1.0, 2.0, 1.0  # of a run, of one that others start from, of a drift snapshot
SLICES_S = 60.0  # three times the start of Python and its libraries, and Triton's kernels compiled once


@cache
def parameters(text: str) -> int:
    with torch.device("meta"):
        return sum(one.numel() for one in new_model(ModelSpec.model_validate_json(text), 0).parameters())


@cache
def longest(text: str, pictures: bool) -> int:
    """Tokens of a task's longest example, of 200."""
    spec = TaskSpec.model_validate_json(text)
    tokenizer = tokenizer_of(ModelSpec(config={"vision_config": {}} if pictures else {}))
    examples = examples_of(spec.model_copy(update={"train": 1, "share": 1.0}), 1, "test")[1]
    return max(len(one.input_ids) for one in encode_task(tokenizer, examples, 1024).examples)


def tokens(run: Base | Train) -> int:
    """Of a row, padding included."""
    model = base_of(run).model
    if isinstance(run, Train):
        return max(longest(task.model_dump_json(), model.sees) for task in run.tasks)
    if not model.sees:
        return CHARACTERS
    return max(EMBEDDINGS + len(one.messages[1][1]) + 1 for one in captioned(0, 200))


def seconds(run: Run, kept: bool) -> float:
    own = KEPT_S if kept else LEAF_S
    recipe = run.recipe if isinstance(run, Base | Train) else None
    if recipe is None or not isinstance(run, Base | Train):
        assert isinstance(run, Base | Interpolate), "other kinds of runs are not counted here"
        return own
    assert recipe.steps is not None
    flops = 6 * parameters(base_of(run).model.model_dump_json()) * recipe.batch * tokens(run)
    step, steps = HOST_S + flops / FLOPS, recipe.steps
    for text in run.observe if isinstance(run, Train) else ():
        name, _, options = text.partition(":")
        assert name == "drift"
        every = int(dict(one.split("=") for one in options.split(","))["every"])
        snapshots = 1 + -(-steps // every)
        own += snapshots * (16 * step + TOP_SETS_S)
    return own + steps * step


def by_table(preset: Preset) -> dict[str, float]:
    """Seconds of every table's runs that no table before it has, and of "all"."""
    plan = Plan.of(run for name in preset.tables for run in TABLES[name].runs(preset))
    counted: set[str] = set()
    found = {}
    for name in preset.tables:
        runs = Plan.of(TABLES[name].runs(preset)).runs
        new = {key: run for key, run in runs.items() if key not in counted}
        counted |= new.keys()
        found[name] = sum(seconds(run, key in plan.keep) for key, run in new.items())
    return found | {"slices": SLICES_S, "all": SLICES_S + sum(found.values())}
