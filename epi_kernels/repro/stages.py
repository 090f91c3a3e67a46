"""Runs that train: a base model on text, a stage on tasks."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from epi_kernels.distributed.shards import local
from epi_kernels.finetune.chat import Encoded
from epi_kernels.finetune.errors import UserError
from epi_kernels.finetune.fsdp import shard
from epi_kernels.finetune.model import pad_id, weights_fingerprint
from epi_kernels.isolation import freeze, sample_stage
from epi_kernels.optim import MaskedEMAAdamW
from epi_kernels.optim.exchange import save_isolation
from epi_kernels.repro import sharded
from epi_kernels.repro.characters import pretraining_text
from epi_kernels.repro.config import Recipe
from epi_kernels.repro.data import Batches, StageProbes
from epi_kernels.repro.evaluate import encode_task
from epi_kernels.repro.hub import CHECKPOINT_FILES, fetched
from epi_kernels.repro.manifest import PLAIN
from epi_kernels.repro.measure import Observer, make_observers
from epi_kernels.repro.measure.cost import PeakMemory, StepTimer, stage_bytes
from epi_kernels.repro.methods import make_method
from epi_kernels.repro.methods.config import Full, Method
from epi_kernels.repro.models import has_plain_template, load_model, new_model, tokenizer_of
from epi_kernels.repro.runs import Base, Run, Train, ancestry, base_of, key
from epi_kernels.repro.stage import Stage
from epi_kernels.repro.tasks.synthetic.pictured import captioned
from epi_kernels.repro.train import Limits, Meters, read_progress, save_progress, train
from epi_kernels.repro.weights import core_of
from epi_kernels.repro.workshop import Result, Workshop, encoded, model_writer, scores_of

TEXTS, CHARACTERS = 20_000, 48  # rows of task-free text that a base model learns from, and the length of one
PICTURES = 10_000  # that a base model learns to see from


def run_base(run: Base, shop: Workshop) -> Result:
    tokenizer = shop.ranks.together(tokenizer_of, run.model)
    if run.recipe is None:
        model = shop.ranks.together(_before, run, shop).to(shop.device)
        scores = scores_of(model, tokenizer, run.evaluate, run.seed, shop)
        return Result(
            *scores, model_writer(model, tokenizer), {"notes": {PLAIN: has_plain_template(tokenizer)}}
        )
    rows = (_pictures if run.model.sees else _text)(tokenizer, run.seed)
    return _stage(run, shop, run.recipe, Full(optimizer="epi"), Examples([rows], ("text",)))


def _before(run: Base | Train, shop: Workshop) -> Any:
    """The model before a stage."""
    if isinstance(run, Train):
        return load_model(shop.store.weights(run.before), base_of(run).model, shop.loads_to)
    if run.model.checkpoint is not None:
        folder = fetched(run.model.checkpoint, run.model.revision, CHECKPOINT_FILES)
        return load_model(folder, run.model, shop.loads_to)
    return new_model(run.model, run.seed).to(shop.loads_to)


@lru_cache(maxsize=1)
def _text(tokenizer: Any, seed: int) -> list[Encoded]:
    """Every token of it is learned."""
    rows = (
        tokenizer(one, add_special_tokens=False)["input_ids"]
        for one in pretraining_text(seed, TEXTS, CHARACTERS)
    )
    return [Encoded(ids, list(ids)) for ids in rows]


@lru_cache(maxsize=1)
def _pictures(tokenizer: Any, seed: int) -> list[Encoded]:
    """What stands in them is learned."""
    return encode_task(tokenizer, captioned(seed, PICTURES), sys.maxsize).examples


@dataclass
class Examples:
    """Of a stage's tasks, one list each: those that it learns from, and those of the split that is never trained on."""

    learned: Sequence[Sequence[Encoded]]
    kinds: Sequence[str]
    held_out: Sequence[Sequence[Encoded]] = ()
    replayed: Sequence[Encoded] = ()
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def fingerprint(self) -> str:
        lists = (*self.learned, *self.held_out, self.replayed)
        text = json.dumps([[(one.input_ids, one.labels) for one in part] for part in lists])
        return hashlib.sha256(text.encode()).hexdigest()


def run_train(run: Train, shop: Workshop) -> Result:
    examples = shop.ranks.together(_examples, run)
    result = _stage(run, shop, run.recipe, run.method, examples)
    result.facts["notes"]["data"] = examples.counts
    return result


def _examples(run: Train) -> Examples:
    spec = base_of(run).model
    tokenizer = tokenizer_of(spec)
    parts = [encoded(tokenizer, task, run.seed, run.recipe.max_length) for task in run.tasks]
    kinds = [task.kind for task in run.tasks]
    examples: list[list[Encoded]] = [part.examples for part in parts]
    if run.sampled < 1:
        examples = _sampled(run, tokenizer)
    held_out = [
        encoded(tokenizer, task, run.seed, run.recipe.max_length, "test").examples for task in run.tasks
    ]
    counts = {
        kind: {
            "examples": part.counts.examples,
            "truncated": part.counts.truncated,
            "dropped": part.counts.dropped,
            "learned": len(learned),
        }
        for kind, part, learned in zip(kinds, parts, examples)
    }
    return Examples(examples, kinds, held_out, _replayed(run, tokenizer), counts)


def _sampled(run: Train, tokenizer: Any) -> list[list[Encoded]]:
    """Of each of the stage's tasks, what is sampled of its examples: the same ones whatever stages there are."""
    pool = run.sampled_of or run.tasks
    parts = [encoded(tokenizer, task, run.seed, run.recipe.max_length).examples for task in pool]
    tagged = [[(at, one) for one in part] for at, part in enumerate(parts)]
    places = [pool.index(task) for task in run.tasks]
    chosen = sample_stage(tagged, places, run.sampled, run.seed)
    return [[one for at, one in chosen if at == place] for place in places]


def _stage(run: Base | Train, shop: Workshop, recipe: Recipe, method: Method, examples: Examples) -> Result:
    """Its peak is taken from before the model is there, data and all else in memory already, to the last step."""
    if shop.device.type == "cpu" and shop.ranks.size == 1 and method.name not in _LOADED:
        _load_libraries(run, shop, recipe, method, examples)
    with PeakMemory(shop.device) as peak:
        model = shop.ranks.together(_before, run, shop)
        return _trained(run, shop, model, recipe, method, examples, peak)


_LOADED: set[str] = set()  # methods that this process has had a stage of


def _load_libraries(
    run: Base | Train, shop: Workshop, recipe: Recipe, method: Method, examples: Examples
) -> None:
    """One step on a model that is dropped: what a method's first step leaves in the process (modules, buffers of torch)
    stays there, and is not the memory of the stage that comes first."""
    stage = _new_stage(run, shop, _before(run, shop), recipe, examples)
    batches = _set_up(stage, method, examples, [], pad_id(tokenizer_of(base_of(run).model)))
    stage.steps = 1
    meters = Meters(StepTimer(shop.device), PeakMemory(shop.device), {})
    train(stage, batches, meters, Limits(), shop.store.folder / "no progress")
    stage.method = None  # as in `_trained`
    _LOADED.add(method.name)


def _new_stage(run: Base | Train, shop: Workshop, model: Any, recipe: Recipe, examples: Examples) -> Stage:
    stage = Stage(
        model=model, recipe=recipe, steps=0, seed=run.seed, device=shop.device, tasks=examples.kinds,
        replayed=examples.replayed, ranks=shop.ranks, sharded=shop.sharded,
    )  # fmt: skip
    if isinstance(run, Train):
        stage.before = shop.store.weights(run.before)
        stage.origin = _origin(run.before, shop)
    return stage


def _trained(
    run: Base | Train,
    shop: Workshop,
    model: Any,
    recipe: Recipe,
    method: Method,
    examples: Examples,
    peak: PeakMemory,
) -> Result:
    tokenizer, ranks = tokenizer_of(base_of(run).model), shop.ranks
    stage, pad = _new_stage(run, shop, model, recipe, examples), pad_id(tokenizer)
    cores: list[Path] = []
    if isinstance(run, Train):
        cores = [core_of(probe, run.core_ratio, shop) for probe in run.frozen]
    if ranks.size > 1:
        ranks.refuse_differences(
            {
                "the examples": examples.fingerprint(),
                "the weights before the stage": weights_fingerprint(model),
            },
            "give all the same data and the same folder --out",
        )
    progress = shop.store.progress(run)
    saved = ranks.together(read_progress, progress)
    if stage.sharded:
        if saved:
            model.load_state_dict(saved["model"])
        shard(model, ranks, str(shop.device))
    batches = ranks.together(_set_up, stage, method, examples, cores, pad)
    observers = ranks.together(_observers, stage, run, batches, examples, pad)
    meters = Meters(StepTimer(shop.device), peak, observers)
    trained = stage.model
    kept = train(stage, batches, meters, shop.limits, progress)
    peak.settle()
    isolation = None
    if stage.sharded:
        kept = sharded.gather(kept, ranks.together(_before, run, shop)).to(shop.device)
        if key(run) in shop.keep and isinstance(stage.optimizer, MaskedEMAAdamW):
            isolation = shop.store.folder / f"{key(run)}.isolation"
            save_isolation(stage.optimizer, isolation)
    try:
        scores = scores_of(kept, tokenizer, run.evaluate, run.seed, shop)
    except UserError as error:  # a judge that is down
        if kept is trained and (
            ranks.size == 1 or error.shared
        ):  # where adapters are merged, or shards gathered, such
            save_progress(stage, meters, stage.steps, progress)  # a run goes on from what was saved last
        raise
    plain = isinstance(method, Full) and method.optimizer == "torch"  # nobody takes importance from it
    result = Result(
        *scores,
        model_writer(kept, tokenizer, None if plain else stage.optimizer, isolation),
        {
            "bytes": stage_bytes(stage, peak),
            "time": meters.timer.result(),
            "series": {name: observer.record() for name, observer in observers.items()},
            "notes": {
                "optimizer": type(stage.optimizer).__name__,
                "steps": stage.steps,
                "isolated": _isolated(stage),
            },
        },
        meters.earlier_s,
    )
    stage.method = None  # each holds the other: the model would stay beside the next run's
    return result


def _set_up(stage: Stage, method: Method, examples: Examples, cores: Sequence[Path], pad: int) -> Batches:
    """The stage's method and steps; its batches."""
    recipe = stage.recipe
    stage.method = make_method(method, stage)
    batches = Batches(
        examples.learned, recipe.batch, stage.seed, pad, replayed=stage.replayed, replay=stage.method.replay
    )
    stage.steps = recipe.steps or batches.steps(recipe.epochs or 0)
    if cores:
        freeze(stage.optimizer, cores)
    return batches


def _observers(
    stage: Stage, run: Base | Train, batches: Batches, examples: Examples, pad: int
) -> dict[str, Observer]:
    """What is measured beside the training."""
    probes = StageProbes(batches, examples.held_out or examples.learned, pad, stage.device)
    return make_observers(run.observe if isinstance(run, Train) else (), stage, probes)


def _isolated(stage: Stage) -> int:
    """Elements, when the stage ended. A call of all ranks."""
    mask_of = getattr(stage.optimizer, "isolation_mask", None)
    if mask_of is None:
        return 0
    params = [param for group in stage.optimizer.param_groups for param in group["params"]]
    found = sum(int(local(mask_of(param)).sum()) for param in params)
    return int(stage.ranks.sums([found])[0]) if stage.sharded else found


def _replayed(run: Train, tokenizer: Any) -> list[Encoded]:
    """Training examples of the tasks that earlier stages learned and this one does not."""
    seen = {task.kind for task in run.tasks}
    rows: list[Encoded] = []
    for one in ancestry(run.before):
        for task in one.tasks if isinstance(one, Train) else ():
            if task.kind not in seen:
                seen.add(task.kind)
                rows += encoded(tokenizer, task, one.seed, run.recipe.max_length).examples
    return rows


def _origin(before: Run, shop: Workshop) -> Any:
    """What the stage before started from."""
    return shop.store.weights(before.before) if isinstance(before, Train) else None
