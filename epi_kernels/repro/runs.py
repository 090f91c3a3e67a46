"""Runs: nodes of a graph, each described in full, with the runs it starts from nested inside.

A run's key is the hash of its description. Two tables that need the same run name the same key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from epi_kernels.repro.config import Count, Grown, ModelSpec, Recipe, Share, Strict, TaskSpec
from epi_kernels.repro.methods.config import Full, Method, Static

Tasks = tuple[TaskSpec, ...]
Fusion = Literal["slerp", "linear"]
Order = Literal["random", "smallest", "largest", "frozen", "curriculum"]


class Base(Strict):
    """Where everything starts: a checkpoint as it is, or a config trained on task-free synthetic text by `recipe`."""

    kind: Literal["base"] = "base"
    model: ModelSpec
    recipe: Recipe | None = None
    evaluate: Tasks = ()
    seed: int = 0


class Train(Grown):
    """One stage: the model of `before` trained on a mixture of `tasks` by `method`."""

    later = ("sampled_of",)

    kind: Literal["train"] = "train"
    before: Run
    tasks: Tasks
    evaluate: Tasks
    recipe: Recipe
    method: Method = Full()
    frozen: tuple[Run, ...] = ()  # probe runs whose cores are frozen (CPI-FT's consolidation)
    core_ratio: Share = 0.01  # of those cores
    sampled: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the tasks' examples, equally many of each
    sampled_of: Tasks = ()  # tasks of all stages, of whose examples `sampled` is a share; (): this stage's alone
    observe: tuple[str, ...] = ()  # measurements beside the training (`measure.OBSERVERS`)
    seed: int = 0

    @model_validator(mode="after")
    def _sampled_of_its_tasks(self) -> Train:
        if self.sampled_of and not set(self.tasks) <= set(self.sampled_of):
            raise ValueError("sampled_of must hold the tasks of this stage")
        return self


class Interpolate(Strict):
    """WiSE-FT (arXiv 2109.01903): (1 - alpha) of the weights before a stage and alpha of those after it."""

    kind: Literal["interpolate"] = "interpolate"
    before: Run
    after: Run
    alpha: Share
    evaluate: Tasks
    seed: int = 0


class Fuse(Strict):
    """CPI-FT's stage 3: cores of the probe runs' models in the backbone's weights, the rest interpolated."""

    kind: Literal["fuse"] = "fuse"
    backbone: Run
    probes: tuple[Run, ...]
    core_ratio: Share = 0.01
    method: Fusion = "slerp"
    omega: Share | None = None  # None: every model weighs the same
    evaluate: Tasks = ()
    seed: int = 0


class CpiFt(Strict):
    """CPI-FT in full, from one probe run a task: cores, groups, staged training, fusion, consolidated training."""

    kind: Literal["cpift"] = "cpift"
    before: Run
    probes: tuple[Run, ...]  # one a task, in the order of `tasks`
    tasks: Tasks
    evaluate: Tasks
    stage: Recipe  # of each group's stage
    consolidation: Recipe  # of each stage on sampled data
    sampled: Annotated[float, Field(gt=0, le=1)] = (
        0.1  # share of all data; the same examples whatever the stages
    )
    core_ratio: Share = 0.01
    tau: Annotated[float, Field(ge=0, le=1)] = 0.1
    order: Order = "random"
    reading: Literal["earlier", "all"] = "earlier"
    single_stage: bool = False
    fusion: Fusion = "slerp"
    omega: Share | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _a_single_stage_freezes_all(self) -> CpiFt:
        if self.single_stage and self.reading != "all":
            raise ValueError('a single stage has no earlier groups: it needs reading "all"')
        return self


Run = Annotated[Base | Train | Interpolate | Fuse | CpiFt, Field(discriminator="kind")]
for _model in (Train, Interpolate, Fuse, CpiFt):
    _model.model_rebuild()


def key(run: Run) -> str:
    """16 hex digits that stand for the whole description."""
    text = json.dumps(run.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parents(run: Run) -> tuple[Run, ...]:
    """The runs that must be there first."""
    match run:
        case Base():
            return ()
        case Train():
            return (run.before, *_origin(run), *run.frozen)
        case Interpolate():
            return (run.before, run.after)
        case Fuse():
            return (run.backbone, *run.probes)
        case CpiFt():
            return (run.before, *run.probes)


def _origin(run: Train) -> tuple[Run, ...]:
    """What the stage before started from, where a mask is made of how far that stage moved."""
    moved = isinstance(run.method, Static) and run.method.by == "delta"
    return (run.before.before,) if moved and isinstance(run.before, Train) else ()


def ancestry(run: Run) -> Iterator[Run]:
    """The run and all it rests on, parents before children."""
    for parent in parents(run):
        yield from ancestry(parent)
    yield run


def base_of(run: Run) -> Base:
    """The model at the root."""
    while not isinstance(run, Base):
        run = run.backbone if isinstance(run, Fuse) else run.before
    return run


def chain(
    before: Run, stages: tuple[Tasks, ...], *, evaluate: Tasks, recipe: Recipe, method: Method, seed: int
) -> Run:
    """Stages one after the other, as multi-stage fine-tuning does."""
    for tasks in stages:
        before = Train(before=before, tasks=tasks, evaluate=evaluate, recipe=recipe, method=method, seed=seed)
    return before


__all__ = [
    "Base",
    "Count",
    "CpiFt",
    "Fuse",
    "Interpolate",
    "Run",
    "Train",
    "ancestry",
    "base_of",
    "chain",
    "key",
    "parents",
]
