"""The loop of one stage: the same for every method, stopped and continued to the bit.

On several ranks each takes its part of every step's rows; the gradients' sum is one process's gradient. Dropout is drawn
from the seed, the step and the rank: it needs no saved generator, and alone differs with the number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epi_kernels.demo.train import schedule
from epi_kernels.distributed.shards import is_sharded
from epi_kernels.files import whole
from epi_kernels.finetune.fsdp import laid_out, whole_state, whole_weights
from epi_kernels.finetune.model import weights_fingerprint
from epi_kernels.finetune.train import step_seed
from epi_kernels.optim import MaskedEMAAdamW
from epi_kernels.repro.config import Recipe
from epi_kernels.repro.data import Batches
from epi_kernels.repro.measure import Observer
from epi_kernels.repro.measure.cost import PeakMemory, StepTimer
from epi_kernels.repro.stage import Batch, Stage, seed_random

HOST = torch.device("cpu")
SAVE, STOP = 1, 2  # what the clock asks for
SAVING = 10  # a 7B model's weights and states are tens of gigabytes: writing them takes a tenth of the time at most


class Stopped(Exception):
    """The time limit was reached; the run goes on from what was saved."""


@dataclass
class Limits:
    """When a run must stop, and how it says that it goes on."""

    deadline: float | None = None  # time.time()
    save_every_s: float = 120.0  # or SAVING times as long as a save took, if that is more
    tick: Callable[[], None] = lambda: None  # after every step


def lr_factor(recipe: Recipe, step: int, steps: int) -> float:
    """Of the peak learning rate, at a step that counts from 0: linear warm-up, then the recipe's schedule to `floor`."""
    if recipe.schedule == "cosine":
        return schedule(step, steps, recipe.warmup, recipe.floor)
    warm = max(1, round(steps * recipe.warmup))
    if step < warm:
        return (step + 1) / warm
    if recipe.schedule == "constant":
        return 1.0
    return 1 - (1 - recipe.floor) * (step - warm) / max(1, steps - warm)


@dataclass
class Meters:
    """What is measured of a stage."""

    timer: StepTimer
    peak: PeakMemory
    observers: Mapping[str, Observer]
    earlier_s: float = 0.0  # that the stage took before it was stopped
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return self.earlier_s + time.perf_counter() - self.began


def train(stage: Stage, batches: Batches, meters: Meters, limits: Limits, progress: Path) -> Any:
    """Trains `stage.model` by `stage.method`, from its first step or from what `progress` holds; returns the model to
    keep. Raises Stopped, after it has saved."""
    recipe, method, ranks = stage.recipe, stage.method, stage.ranks
    timer, observers = meters.timer, meters.observers.values()
    parameters = [param for group in stage.optimizer.param_groups for param in group["params"]]
    first = ranks.together(_load, stage, meters, progress)
    saved, pause = time.monotonic(), limits.save_every_s
    for step in range(first, stage.steps):
        # All ranks stop before the same step, and none before its first: slices shorter than a start get on, too.
        due = ranks.highest(_due(limits, saved + pause)) if step > first else 0
        if due:
            refuse_drift(stage, f"before step {step + 1}")
            began = time.monotonic()
            save_progress(stage, meters, step, progress)
            saved = time.monotonic()
            pause = max(limits.save_every_s, SAVING * (saved - began))
        if due == STOP:
            raise Stopped
        seed_random(stage.device, step_seed(stage.seed, step, ranks.rank))
        with timer.gradient():
            for group in stage.optimizer.param_groups:
                group["lr"] = recipe.lr * lr_factor(recipe, step, stage.steps)
            batch = batches.batch(step, HOST)
            stage.batch = batch.to(stage.device)
            stage.optimizer.zero_grad()
            stage.loss = _backward(stage, stage.batch, batch.answer_tokens().tolist())
            method.gather()
            norm: Any = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if recipe.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, recipe.clip, norm)
            stage.grad_norm = norm.full_tensor() if is_sharded(norm) else norm
        for observer in observers:
            observer.before_step(stage, step)
        with timer.update():
            method.step(step)
        for observer in observers:
            observer.after_step(stage, step)
        limits.tick()
    refuse_drift(stage, "at its end")
    return method.finish()


def _due(limits: Limits, save_at: float) -> int:
    if limits.deadline is not None and time.time() >= limits.deadline:
        return STOP
    return SAVE if time.monotonic() >= save_at else 0


def refuse_drift(stage: Stage, when: str) -> None:
    """Raises UserError, on every rank, when their weights are not the same."""
    if stage.ranks.size > 1 and not stage.sharded:
        stage.ranks.refuse_differences(
            {"weights": weights_fingerprint(stage.model)},
            f"the stage's are no longer those of one run {when}; finished runs are kept",
        )


def _backward(stage: Stage, batch: Batch, tokens: Sequence[int]) -> Tensor | float:
    """This rank's part of the gradients of the mean loss over the batch's answer tokens, of which each row has
    `tokens`, whatever the ranks and micro-batches; returns that loss. On one rank nothing here waits for the device."""
    size = len(batch.input_ids) // stage.recipe.accumulation
    total = max(1, sum(tokens))
    mine = slice(stage.ranks.rank, None, stage.ranks.size)
    loss: Tensor | float = 0.0
    own, counts = batch.rows(mine), tokens[mine]
    most = -(-len(batch.input_ids) // stage.ranks.size)  # rows of a rank
    for at in range(0, most, size):
        rows = slice(at, at + size)
        weight = sum(counts[rows]) / total
        if weight:
            loss = loss + weight * stage.method.backward(own.rows(rows), weight).double()
        elif stage.sharded:
            stage.method.idle(batch.rows(slice(0, 1)))
    return loss if stage.ranks.size == 1 else stage.ranks.sums([float(loss)])[0]


def read_progress(path: Path) -> dict[str, Any] | None:
    """What a stopped run saved; None where there is nothing. Its tensors are read from the file when they are used."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True) if path.is_file() else None


def save_progress(stage: Stage, meters: Meters, step: int, progress: Path) -> None:
    """Everything from which `train` goes on at `step`, as one process has it, whatever the ranks. A call of all of
    them."""
    model = whole_weights(stage.model, stage.ranks) if stage.sharded else stage.model.state_dict()
    optimizer = whole_state(stage.optimizer, stage.ranks)
    stage.ranks.first_does(_write, stage, meters, step, progress, model, optimizer)


def _write(
    stage: Stage, meters: Meters, step: int, progress: Path, model: dict[str, Any], optimizer: dict[str, Any]
) -> None:
    state = {
        "step": step,
        "model": model,
        "optimizer": optimizer,
        "method": stage.method.state_dict(),
        "observers": {name: observer.state_dict() for name, observer in meters.observers.items()},
        "timer": meters.timer.state_dict(),
        "peak": meters.peak.state_dict(),
        "seconds": meters.seconds,
    }
    with whole(progress) as partial:
        torch.save(state, partial)


def _load(stage: Stage, meters: Meters, progress: Path) -> int:
    """The step to go on with: 0 where nothing was saved."""
    state = read_progress(progress)
    if state is None:
        return 0
    if not stage.sharded:  # its weights were loaded before they were cut
        stage.model.load_state_dict(state["model"])
    in_parts = stage.sharded and not isinstance(stage.optimizer, MaskedEMAAdamW)
    optimizer = state["optimizer"]
    stage.optimizer.load_state_dict(laid_out(optimizer, stage.optimizer) if in_parts else optimizer)
    stage.method.load_state_dict(state["method"])
    for name, observer in meters.observers.items():
        observer.load_state_dict(state["observers"][name])
    meters.timer.load_state_dict(state["timer"])
    meters.peak.load_state_dict(state["peak"])
    meters.earlier_s = state.get("seconds", 0.0)  # an earlier version's file has none
    return state["step"]
