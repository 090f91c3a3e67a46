"""Runs that train: a base model on text, a stage on tasks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from epi_kernels.finetune.chat import Encoded
from epi_kernels.finetune.model import pad_id
from epi_kernels.isolation import freeze, sample_stage
from epi_kernels.optim import MaskedEMAAdamW
from epi_kernels.repro.characters import pretraining_text
from epi_kernels.repro.config import Recipe
from epi_kernels.repro.data import Batches, StageProbes
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.measure import make_observers
from epi_kernels.repro.measure.cost import PeakMemory, StepTimer, stage_bytes
from epi_kernels.repro.methods import make_method
from epi_kernels.repro.methods.config import Full, Method
from epi_kernels.repro.models import load_model, new_model, tokenizer_of
from epi_kernels.repro.runs import Base, Run, Train, ancestry, base_of
from epi_kernels.repro.stage import Stage
from epi_kernels.repro.store import local_checkpoint
from epi_kernels.repro.train import Meters, read_progress, save_progress, train
from epi_kernels.repro.weights import core_of
from epi_kernels.repro.workshop import Result, Workshop, encoded, model_writer, scores_of

TEXTS, CHARACTERS = 20_000, 48  # rows of task-free text that a base model learns from, and the length of one


def run_base(run: Base, shop: Workshop) -> Result:
    tokenizer = tokenizer_of(run.model)
    if run.model.checkpoint is not None:
        model = load_model(local_checkpoint(run.model.checkpoint), run.model, shop.device)
    else:
        model = new_model(run.model, run.seed).to(shop.device)
    if run.recipe is not None:
        return _stage(
            run, shop, model, run.recipe, Full(optimizer="epi"), [_text(tokenizer, run.seed)], ("text",)
        )
    scores = scores_of(model, tokenizer, run.evaluate, run.seed, shop)
    return Result(*scores, model_writer(model, tokenizer))


@lru_cache(maxsize=1)
def _text(tokenizer: Any, seed: int) -> list[Encoded]:
    """Every token of it is learned."""
    rows = (
        tokenizer(one, add_special_tokens=False)["input_ids"]
        for one in pretraining_text(seed, TEXTS, CHARACTERS)
    )
    return [Encoded(ids, list(ids)) for ids in rows]


def run_train(run: Train, shop: Workshop) -> Result:
    spec = base_of(run).model
    tokenizer = tokenizer_of(spec)
    parts = [encoded(tokenizer, task, run.seed, run.recipe.max_length) for task in run.tasks]
    kinds = [task.kind for task in run.tasks]
    examples: list[list[Encoded]] = [part.examples for part in parts]
    if run.sampled < 1:
        tagged = [[(at, one) for one in part] for at, part in enumerate(examples)]
        chosen = sample_stage(tagged, range(len(tagged)), run.sampled, run.seed)
        examples = [[one for at, one in chosen if at == task] for task in range(len(parts))]
    model = load_model(shop.store.weights(run.before), spec, shop.device)
    held_out = [
        encoded(tokenizer, task, run.seed, run.recipe.max_length, "test").examples for task in run.tasks
    ]
    result = _stage(run, shop, model, run.recipe, run.method, examples, kinds, held_out)
    result.facts["notes"]["data"] = {
        kind: {
            "examples": part.counts.examples,
            "truncated": part.counts.truncated,
            "dropped": part.counts.dropped,
        }
        for kind, part in zip(kinds, parts)
    }
    return result


def _stage(
    run: Base | Train,
    shop: Workshop,
    model: Any,
    recipe: Recipe,
    method: Method,
    examples: Sequence[Sequence[Encoded]],
    kinds: Sequence[str],
    held_out: Sequence[Sequence[Encoded]] = (),
) -> Result:
    tokenizer = tokenizer_of(base_of(run).model)
    stage = Stage(model=model, recipe=recipe, steps=0, seed=run.seed, device=shop.device, tasks=kinds)
    if isinstance(run, Train):
        stage.before = shop.store.weights(run.before)
        stage.origin = _origin(run.before, shop)
        stage.replayed = _replayed(run, tokenizer)
    progress = shop.store.progress(run)
    at_least = (read_progress(progress) or {"peak": 0})["peak"]
    pad = pad_id(tokenizer)
    with PeakMemory(shop.device, at_least) as peak:
        stage.method = make_method(method, stage)
        batches = Batches(
            examples, recipe.batch, run.seed, pad, replayed=stage.replayed, replay=stage.method.replay
        )
        stage.steps = recipe.steps or batches.steps(recipe.epochs or 0)
        if isinstance(run, Train) and run.frozen:
            freeze(stage.optimizer, [core_of(probe, run.core_ratio, shop) for probe in run.frozen])
        probes = StageProbes(batches, held_out or examples, pad, shop.device)
        observers = make_observers(run.observe if isinstance(run, Train) else (), stage, probes)
        meters = Meters(StepTimer(shop.device), peak, observers)
        trained = stage.model
        kept = train(stage, batches, meters, shop.limits, progress)
    try:
        scores = scores_of(kept, tokenizer, run.evaluate, run.seed, shop)
    except ReproError:  # a judge that is down
        if kept is trained:  # adapters are merged by now: such a run goes on from what was saved last
            save_progress(stage, meters, stage.steps, progress)
        raise
    plain = isinstance(method, Full) and method.optimizer == "torch"  # nobody takes importance from it
    return Result(
        *scores,
        model_writer(kept, tokenizer, None if plain else stage.optimizer),
        {
            "bytes": stage_bytes(stage, peak),
            "time": meters.timer.result(),
            "series": {name: observer.record() for name, observer in observers.items()},
            "notes": {
                "optimizer": type(stage.optimizer).__name__,
                "steps": stage.steps,
                "isolated": _isolated(stage.optimizer),
            },
        },
    )


def _isolated(optimizer: torch.optim.Optimizer) -> int:
    """Elements, when the stage ended."""
    if not isinstance(optimizer, MaskedEMAAdamW):
        return 0
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return sum(int(optimizer.isolation_mask(param).sum()) for param in params)


def _replayed(run: Train, tokenizer: Any) -> list[Encoded]:
    """Training examples of the tasks that earlier stages learned and this one does not."""
    seen = {task.kind for task in run.tasks}
    rows: list[Encoded] = []
    for one in ancestry(run.before):
        for task in one.tasks if isinstance(one, Train) else ():
            if task.kind not in seen:
                seen.add(task.kind)
                rows += encoded(tokenizer, task, run.seed, run.recipe.max_length).examples
    return rows


def _origin(before: Run, shop: Workshop) -> Any:
    """What the stage before started from."""
    return shop.store.weights(before.before) if isinstance(before, Train) else None
