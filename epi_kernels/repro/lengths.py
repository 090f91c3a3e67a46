"""How long runs are, in training steps: what a progress bar needs to say how much time is left."""

from __future__ import annotations

import math
from collections.abc import Sequence

from epi_kernels.repro.config import Recipe, TaskSpec
from epi_kernels.repro.runs import Base, CpiFt, Run, Train
from epi_kernels.repro.workshop import examples_of


def steps_of(run: Run) -> int:
    """As far as they are known before: how many groups CPI-FT makes is not. 1 where nothing is trained.

    Epochs are counted in the tasks' examples, for which real data are read. Raises ReproError.
    """
    match run:
        case Base():
            return (run.recipe.steps if run.recipe else None) or 1
        case Train():
            return _steps(run.recipe, run.tasks, run.sampled)
        case CpiFt():
            return _steps(run.stage, run.tasks, 1.0) + _steps(run.consolidation, run.tasks, run.sampled)
    return 1


def _steps(recipe: Recipe, tasks: Sequence[TaskSpec], share: float) -> int:
    if recipe.steps is not None:
        return recipe.steps
    examples = sum(share * task.share * _examples(task) for task in tasks)
    return max(1, math.ceil((recipe.epochs or 0) * examples / recipe.batch))


def _examples(spec: TaskSpec) -> int:
    """Of the whole training split, which all shares of it are read once for."""
    return len(examples_of(spec.model_copy(update={"share": 1.0}), 0, "train")[1])
