"""The runs of a preset's plans. Tables build them here and nowhere else, so that equal runs have equal keys."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from epi_kernels.repro.config import Recipe, TaskSpec
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.methods.config import Epi, Ewc, Full, Method, Static
from epi_kernels.repro.preset import CpiFtPlan, Imbalance, Mixture, Pair, Preset, Try
from epi_kernels.repro.runs import Base, CpiFt, Interpolate, Run, Tasks, Train, chain, key
from epi_kernels.repro.tables.access import (
    drift_plan,
    imbalance_plan,
    mixture_plan,
    sequential_plan,
    specs,
)


def first_model(preset: Preset) -> str:
    return next(iter(preset.models))


def base(preset: Preset, model: str | None = None) -> Base:
    """Where every run of a model starts, of all seeds: a checkpoint, or a config trained on task-free text."""
    spec = preset.models[model or first_model(preset)]
    kinds = {task.kind: task for task in reversed(preset.tasks.values())}
    evaluate = tuple(reversed(kinds.values()))  # one of a kind, in the preset's order
    return Base(model=spec, recipe=preset.pretrain if spec.config is not None else None, evaluate=evaluate)


def at_rate(recipe: Recipe, lr: float | None) -> Recipe:
    return recipe if lr is None else recipe.model_copy(update={"lr": lr})


# --- two tasks, one after the other ---------------------------------------------------------------------------------


def sequential_tasks(preset: Preset) -> Tasks:
    """What every run of the plan is scored on."""
    pairs = sequential_plan(preset, "frontier").pairs
    return specs(preset, [name for pair in pairs for name in (pair.first, pair.second)])


def learn(preset: Preset, pair: Pair, seed: int) -> Train:
    """The first stage: full fine-tuning that keeps the importance for the second."""
    return Train(
        before=base(preset),
        tasks=(preset.tasks[pair.first],),
        evaluate=sequential_tasks(preset),
        recipe=pair.learn,
        method=Full(optimizer="epi"),
        seed=seed,
    )


def adapt(
    preset: Preset, pair: Pair, one: Try, seed: int, *, observe: tuple[str, ...] = (), **changes: Any
) -> Train:
    """The second stage. `changes` are of the recipe."""
    return Train(
        before=learn(preset, pair, seed),
        tasks=(preset.tasks[pair.second],),
        evaluate=sequential_tasks(preset),
        recipe=at_rate(pair.adapt, one.lr).model_copy(update=changes),
        method=one.method,
        observe=observe,
        seed=seed,
    )


def full_run(preset: Preset, pair: Pair, lr: float | None, seed: int, **changes: Any) -> Train:
    """Full fine-tuning's second stage; lr None is the recipe's."""
    return adapt(preset, pair, Try(method=Full(), lr=lr), seed, **changes)


def full_runs(preset: Preset, pair: Pair, seed: int) -> list[Run]:
    """Full fine-tuning's frontier, by the plan's learning rates."""
    return [full_run(preset, pair, lr, seed) for lr in sequential_plan(preset, "frontier").full_lrs]


def interpolated(preset: Preset, pair: Pair, lr: float, alpha: float, seed: int) -> Interpolate:
    return Interpolate(
        before=learn(preset, pair, seed),
        after=full_run(preset, pair, lr, seed),
        alpha=alpha,
        evaluate=sequential_tasks(preset),
        seed=seed,
    )


def wise_runs(preset: Preset, pair: Pair, seed: int) -> list[Run]:
    """WiSE-FT's frontier: points between the weights before and after each of full fine-tuning's runs."""
    plan = sequential_plan(preset, "frontier")
    return [interpolated(preset, pair, lr, alpha, seed) for lr in plan.full_lrs for alpha in plan.alphas]


def adapted(preset: Preset, pair: Pair, seeds: Iterable[int]) -> list[Run]:
    """What every comparison of arms on a pair needs: before, full fine-tuning's frontier, and the settled arms."""
    arms = sequential_plan(preset, "frontier").arms.values()
    runs: list[Run] = []
    for seed in seeds:
        runs += [learn(preset, pair, seed), *full_runs(preset, pair, seed)]
        runs += [adapt(preset, pair, arm.settled, seed) for arm in arms]
    return runs


# --- mixtures -------------------------------------------------------------------------------------------------------


def rests_on_a_stage(method: Method) -> bool:
    """Whether a method takes its mask, its moments or its penalty from a stage before."""
    if isinstance(method, Full):
        return method.keep_moments
    if isinstance(method, Epi) and method.core > 0:
        return True
    return isinstance(method, Static | Ewc) or getattr(method, "carry", False)


def _less(recipe: Recipe, spent: Recipe) -> Recipe:
    """What is left of a budget once a stage has been paid from it."""
    if recipe.steps is not None and spent.steps is not None and recipe.steps > spent.steps:
        return recipe.model_copy(update={"steps": recipe.steps - spent.steps})
    if recipe.epochs is not None and spent.epochs is not None and recipe.epochs > spent.epochs:
        return recipe.model_copy(update={"epochs": recipe.epochs - spent.epochs})
    raise ReproError("a mixture's recipe must be longer than its probe, in the same unit (steps or epochs)")


def mixed(
    before: Base, tasks: Tasks, plan: Mixture | Imbalance, one: Try, seed: int, observe: tuple[str, ...] = ()
) -> Train:
    """One stage on all tasks. A method that rests on a stage before gets one, of the probe's length, on the same
    mixture and out of the same budget."""
    recipe, start = plan.recipe, before
    if rests_on_a_stage(one.method):
        start = Train(
            before=before,
            tasks=tasks,
            evaluate=tasks,
            recipe=plan.cpift.probe,
            method=Full(optimizer="epi"),
            seed=seed,
        )
        recipe = _less(recipe, plan.cpift.probe)
    return Train(
        before=start,
        tasks=tasks,
        evaluate=tasks,
        recipe=at_rate(recipe, one.lr),
        method=one.method,
        observe=observe,
        seed=seed,
    )


def cpift_run(before: Base, tasks: Tasks, plan: CpiFtPlan, seed: int, **changes: Any) -> CpiFt:
    """CPI-FT with its probes; `changes` are of CpiFt's own fields (tau, core_ratio, reading, single_stage, ...)."""
    probes = tuple(
        Train(before=before, tasks=(task,), evaluate=tasks, recipe=plan.probe, seed=seed) for task in tasks
    )
    fields = {
        "sampled": plan.share,
        "core_ratio": plan.core_ratio,
        "tau": plan.tau,
        "order": plan.order,
        "fusion": plan.fusion,
        "omega": plan.omega,
        **changes,
    }
    return CpiFt(
        before=before,
        probes=probes,
        tasks=tasks,
        evaluate=tasks,
        stage=plan.stage,
        consolidation=plan.consolidation,
        seed=seed,
        **fields,
    )


def mixture_tasks(preset: Preset) -> Tasks:
    return specs(preset, mixture_plan(preset, "epi-main").tasks)


def mixture(
    preset: Preset, one: Try, seed: int, model: str | None = None, observe: tuple[str, ...] = ()
) -> Train:
    plan = mixture_plan(preset, "epi-main")
    return mixed(base(preset, model), mixture_tasks(preset), plan, one, seed, observe)


def full_try(plan: Mixture | Imbalance) -> Try:
    """Full fine-tuning on a mixture: the plan's own arm of it where there is one, else at the recipe's rate."""
    settled = (arm.settled for arm in plan.arms.values())
    return next((one for one in settled if _is_plain(one.method)), Try(method=Full()))


def other_arms(plan: Mixture | Imbalance) -> dict[str, Try]:
    """The other arms, with their chosen settings."""
    return {name: arm.settled for name, arm in plan.arms.items() if not _is_plain(arm.settled.method)}


def _is_plain(method: Method) -> bool:
    return isinstance(method, Full) and not method.keep_moments


def mixture_cpift(preset: Preset, seed: int, model: str | None = None, **changes: Any) -> CpiFt:
    plan = mixture_plan(preset, "cpift-1")
    return cpift_run(base(preset, model), mixture_tasks(preset), plan.cpift, seed, **changes)


def stages_run(preset: Preset, stages: Sequence[Tasks], seed: int, model: str | None = None) -> Run:
    """Multi-stage fine-tuning of every weight. The budget's steps are divided among the stages, to the last step;
    epochs are of a stage's own data and stay."""
    plan = mixture_plan(preset, "cpift-1")
    run: Run = base(preset, model)
    for index, tasks in enumerate(stages):
        recipe = plan.recipe
        if recipe.steps is not None:
            if recipe.steps < len(stages):
                raise ReproError(f"preset {preset.name}: {recipe.steps} steps for {len(stages)} stages")
            steps = recipe.steps // len(stages) + (index < recipe.steps % len(stages))
            recipe = recipe.model_copy(update={"steps": steps})
        run = chain(run, (tasks,), evaluate=mixture_tasks(preset), recipe=recipe, method=Full(), seed=seed)
    return run


def random_stages(preset: Preset, seed: int) -> list[Tasks]:
    """A partition of the mixture's tasks in a random order, drawn by the seed; sizes differ by one at most."""
    plan, tasks = mixture_plan(preset, "cpift-1"), list(mixture_tasks(preset))
    if plan.random_stages > len(tasks):
        raise ReproError(
            f"preset {preset.name}: mixture.random_stages is {plan.random_stages}, there are {len(tasks)} tasks"
        )
    random.Random(f"multi-stage {seed}").shuffle(tasks)
    size, more = divmod(len(tasks), plan.random_stages)
    stages, start = [], 0
    for index in range(plan.random_stages):
        stop = start + size + (index < more)
        stages.append(tuple(tasks[start:stop]))
        start = stop
    return stages


def heuristic_stages(preset: Preset) -> list[Tasks]:
    """The grouping that the preset states."""
    plan = mixture_plan(preset, "cpift-1")
    named = sorted(name for stage in plan.heuristic for name in stage)
    if named != sorted(plan.tasks):
        raise ReproError(
            f"preset {preset.name}: mixture.heuristic must put each of the mixture's tasks in one stage"
        )
    return [specs(preset, stage) for stage in plan.heuristic]


# --- imbalance and drift --------------------------------------------------------------------------------------------


def cut(preset: Preset, scarce: str, share: float) -> Tasks:
    """The tasks of the imbalance plan, one of them with a share of its training data."""
    names = imbalance_plan(preset, "cpift-4").tasks
    return tuple(
        spec.model_copy(update={"share": spec.share * share}) if spec == preset.tasks[scarce] else spec
        for spec in specs(preset, names)
    )


def drift_run(preset: Preset, model: str, seed: int, observe: tuple[str, ...]) -> Train:
    """Full fine-tuning on a mixture, with the importance watched."""
    plan = drift_plan(preset, "drift")
    tasks = specs(preset, plan.tasks)
    return Train(
        before=base(preset, model),
        tasks=tasks,
        evaluate=tasks,
        recipe=plan.recipe,
        method=Full(optimizer="epi"),
        observe=observe,
        seed=seed,
    )


def unique(runs: Iterable[Run]) -> list[Run]:
    """Each run once, in the order of its first mention."""
    return list({key(run): run for run in runs}.values())


def kinds(tasks: Iterable[TaskSpec]) -> tuple[str, ...]:
    return tuple(task.kind for task in tasks)
