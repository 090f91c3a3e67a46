"""Runs small enough for tests: a model of one layer, a few steps."""

from __future__ import annotations

import json
from pathlib import Path

from epi_kernels.repro.config import ModelSpec, Recipe, TaskSpec
from epi_kernels.repro.methods.config import Epi, Full
from epi_kernels.repro.runs import Base, CpiFt, Interpolate, Run, Tasks, Train
from epi_kernels.repro.store import MANIFEST

MODEL = ModelSpec(
    config={
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 128,
    }
)
SUMS, STRINGS, TOPICS = (TaskSpec(kind=kind, train=120, test=20) for kind in ("sums", "strings", "topics"))
RECIPE = Recipe(lr=1e-2, steps=6, batch=8)
BASE = Base(model=MODEL)


def first(seed: int = 1, before: Run = BASE) -> Train:
    """Stage A, which keeps its importance."""
    return Train(
        before=before,
        tasks=(SUMS,),
        evaluate=(SUMS, STRINGS),
        recipe=RECIPE,
        method=Full(optimizer="epi"),
        seed=seed,
    )


def second(method=None, seed: int = 1, recipe: Recipe = RECIPE, observe: tuple[str, ...] = ()) -> Train:
    """Stage B."""
    return Train(
        before=first(seed),
        tasks=(STRINGS,),
        evaluate=(SUMS, STRINGS),
        recipe=recipe,
        method=method or Epi(ratio=0.2, interval=2),
        observe=observe,
        seed=seed,
    )


def halfway(run: Train) -> Interpolate:
    return Interpolate(before=run.before, after=run, alpha=0.5, evaluate=run.evaluate, seed=run.seed)


def cpift(**options) -> CpiFt:
    tasks: Tasks = (SUMS, STRINGS, TOPICS)
    probes = tuple(
        Train(before=BASE, tasks=(task,), evaluate=(task,), recipe=RECIPE, seed=1) for task in tasks
    )
    fields = {
        "stage": RECIPE,
        "consolidation": RECIPE,
        "sampled": 0.5,
        "core_ratio": 0.1,
        "tau": 0.1,
        "seed": 1,
    }
    return CpiFt(before=BASE, probes=probes, tasks=tasks, evaluate=tasks, **{**fields, **options})


def manifests(folder: Path) -> dict[str, dict]:
    """Of the finished runs in a store, by key, as they lie there."""
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob(f"*/{MANIFEST}")}
