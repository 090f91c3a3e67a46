"""The loop of one stage: the same for every method, stopped and continued to the bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from epi_kernels.demo.train import schedule
from epi_kernels.files import whole
from epi_kernels.finetune.chat import IGNORE
from epi_kernels.repro.config import Recipe
from epi_kernels.repro.data import Batches
from epi_kernels.repro.measure import Observer
from epi_kernels.repro.measure.cost import PeakMemory, StepTimer
from epi_kernels.repro.stage import Batch, Stage

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


def train(stage: Stage, batches: Batches, meters: Meters, limits: Limits, progress: Path) -> Any:
    """Trains `stage.model` by `stage.method`, from its first step or from what `progress` holds; returns the model to
    keep. Raises Stopped, after it has saved."""
    recipe, method, timer, observers = stage.recipe, stage.method, meters.timer, meters.observers.values()
    parameters = [param for group in stage.optimizer.param_groups for param in group["params"]]
    first, saved, pause = _load(stage, meters, progress), time.monotonic(), limits.save_every_s
    for step in range(first, stage.steps):
        is_over = limits.deadline is not None and time.time() >= limits.deadline
        if is_over or time.monotonic() - saved >= pause:
            began = time.monotonic()
            save_progress(stage, meters, step, progress)
            saved = time.monotonic()
            pause = max(limits.save_every_s, SAVING * (saved - began))
        if is_over:
            raise Stopped
        with timer.gradient():
            for group in stage.optimizer.param_groups:
                group["lr"] = recipe.lr * lr_factor(recipe, step, stage.steps)
            stage.batch = batches.batch(step, stage.device)
            stage.optimizer.zero_grad()
            stage.loss = _backward(stage, stage.batch)
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if recipe.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, recipe.clip, norm)
            stage.grad_norm = float(norm)
        for observer in observers:
            observer.before_step(stage, step)
        with timer.update():
            method.step(step)
        for observer in observers:
            observer.after_step(stage, step)
        limits.tick()
    return method.finish()


def _backward(stage: Stage, batch: Batch) -> float:
    """Gradients of the mean loss over the batch's answer tokens, whatever the micro-batches; returns that loss."""
    size = len(batch.input_ids) // stage.recipe.accumulation
    total = max(1, _answer_tokens(batch))
    loss = 0.0
    for at in range(0, len(batch.input_ids), size):
        part = batch.rows(slice(at, at + size))
        weight = _answer_tokens(part) / total
        if weight:
            loss += weight * stage.method.backward(part, weight)
    return loss


def _answer_tokens(batch: Batch) -> int:
    return int((batch.labels[:, 1:] != IGNORE).sum())


def read_progress(path: Path) -> dict[str, Any] | None:
    """What a stopped run saved; None where there is nothing. Its tensors are read from the file when they are used."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True) if path.is_file() else None


def save_progress(stage: Stage, meters: Meters, step: int, progress: Path) -> None:
    """Everything from which `train` goes on at `step`."""
    state = {
        "step": step,
        "model": stage.model.state_dict(),
        "optimizer": stage.optimizer.state_dict(),
        "method": stage.method.state_dict(),
        "observers": {name: observer.state_dict() for name, observer in meters.observers.items()},
        "timer": meters.timer.state_dict(),
        "peak": meters.peak.bytes,
        "random": torch.get_rng_state(),
    }
    with whole(progress) as partial:
        torch.save(state, partial)


def _load(stage: Stage, meters: Meters, progress: Path) -> int:
    """The step to go on with: 0 where nothing was saved."""
    state = read_progress(progress)
    if state is None:
        return 0
    stage.model.load_state_dict(state["model"])
    stage.optimizer.load_state_dict(state["optimizer"])
    stage.method.load_state_dict(state["method"])
    for name, observer in meters.observers.items():
        observer.load_state_dict(state["observers"][name])
    meters.timer.load_state_dict(state["timer"])
    torch.set_rng_state(state["random"])
    return state["step"]
