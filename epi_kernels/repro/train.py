"""The loop of one stage: the same for every method, stopped and continued to the bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epi_kernels.demo.train import schedule
from epi_kernels.files import whole
from epi_kernels.finetune.chat import IGNORE
from epi_kernels.repro.config import Recipe
from epi_kernels.repro.data import Batches
from epi_kernels.repro.measure import Observer
from epi_kernels.repro.measure.cost import PeakMemory, StepTimer
from epi_kernels.repro.stage import Batch, Stage

HOST = torch.device("cpu")


class Stopped(Exception):
    """The time limit was reached; the run goes on from what was saved."""


@dataclass
class Limits:
    """When a run must stop, and how it says that it goes on."""

    deadline: float | None = None  # time.time()
    save_every_s: float = 120.0
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
    first, saved = _load(stage, meters, progress), time.monotonic()
    for step in range(first, stage.steps):
        is_over = limits.deadline is not None and time.time() >= limits.deadline
        if is_over or time.monotonic() - saved >= limits.save_every_s:
            _save(stage, meters, step, progress)
            saved = time.monotonic()
        if is_over:
            raise Stopped
        with timer.gradient():
            for group in stage.optimizer.param_groups:
                group["lr"] = recipe.lr * lr_factor(recipe, step, stage.steps)
            batch = batches.batch(step, HOST)
            stage.batch = batch.to(stage.device)
            stage.optimizer.zero_grad()
            stage.loss = _backward(stage, stage.batch, _answer_tokens(batch))
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if recipe.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, recipe.clip, norm)
            stage.grad_norm = norm
        for observer in observers:
            observer.before_step(stage, step)
        with timer.update():
            method.step(step)
        for observer in observers:
            observer.after_step(stage, step)
        limits.tick()
    return method.finish()


def _backward(stage: Stage, batch: Batch, tokens: Sequence[int]) -> Tensor | float:
    """Gradients of the mean loss over the batch's answer tokens, of which each row has `tokens`, whatever the
    micro-batches; returns that loss. Nothing here waits for the device."""
    size = len(batch.input_ids) // stage.recipe.accumulation
    total = max(1, sum(tokens))
    loss: Tensor | float = 0.0
    for at in range(0, len(batch.input_ids), size):
        rows = slice(at, at + size)
        weight = sum(tokens[rows]) / total
        if weight:
            loss = loss + weight * stage.method.backward(batch.rows(rows), weight).double()
    return loss


def _answer_tokens(batch: Batch) -> list[int]:
    """Of every row; of a batch that is on the host."""
    return (batch.labels[:, 1:] != IGNORE).sum(1).tolist()


def read_progress(path: Path) -> dict[str, Any] | None:
    """What a stopped run saved; None where there is nothing."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None


def _save(stage: Stage, meters: Meters, step: int, progress: Path) -> None:
    state = {
        "step": step,
        "model": stage.model.state_dict(),
        "optimizer": stage.optimizer.state_dict(),
        "method": stage.method.state_dict(),
        "observers": {name: observer.state_dict() for name, observer in meters.observers.items()},
        "timer": meters.timer.state_dict(),
        "peak": meters.peak.bytes,
        "random": torch.get_rng_state(),
        "random_of_device": torch.cuda.get_rng_state(stage.device) if _on_gpu(stage) else None,
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
    if _on_gpu(stage) and state["random_of_device"] is not None:
        torch.cuda.set_rng_state(state["random_of_device"], stage.device)
    return state["step"]


def _on_gpu(stage: Stage) -> bool:
    return stage.device.type == "cuda"
