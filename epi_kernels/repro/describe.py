"""A run in a few words, for people; the manifest has all of it."""

from __future__ import annotations

from epi_kernels.repro.config import Recipe, TaskSpec
from epi_kernels.repro.methods.config import PcGrad, Replay
from epi_kernels.repro.runs import Base, CpiFt, Fuse, Interpolate, Run, Train


def describe(run: Run) -> str:
    """One line, without the runs that it starts from."""
    match run:
        case Base():
            at = f"@{run.model.revision}" if run.model.revision else ""
            made = f"{(run.model.config or {}).get('model_type', 'model')} from a config"
            model = f"{run.model.checkpoint}{at}" if run.model.checkpoint else made
            return f"base: {model}" + (f", {_recipe(run.recipe)}" if run.recipe else "")
        case Train():
            options = run.method.model_dump(exclude_defaults=True)
            options.pop("name", None)
            if isinstance(run.method, Replay | PcGrad):
                options = {"replayed rows of every batch": run.method.share}
            settings = ", ".join(f"{name} {value}" for name, value in options.items())
            method = run.method.name + (f" ({settings})" if settings else "")
            return f"{method} on {_tasks(run.tasks)}, {_recipe(run.recipe)}"
        case Interpolate():
            return f"interpolation, alpha {run.alpha:g}"
        case Fuse():
            return f"fusion of {len(run.probes)} models, p {run.core_ratio:g}, {run.method}"
        case CpiFt():
            kind = "single-stage" if run.single_stage else f"{run.order} order"
            return (
                f"CPI-FT on {_tasks(run.tasks)}, p {run.core_ratio:g}, tau {run.tau:g}, {kind}, "
                f"{run.reading} cores frozen, {run.fusion}"
            )


def _tasks(tasks: tuple[TaskSpec, ...]) -> str:
    return " + ".join(one.kind if one.share == 1 else f"{one.kind} ({one.share:.0%})" for one in tasks)


def _recipe(recipe: Recipe) -> str:
    length = f"{recipe.steps} steps" if recipe.steps is not None else f"{recipe.epochs:g} epochs"
    return f"lr {recipe.lr:g}, {length}"
