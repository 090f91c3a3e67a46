"""PCGrad (arXiv 2001.06782, algorithm 1): a task's gradient loses what points against another task's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from epi_kernels.finetune.train import step_seed
from epi_kernels.repro.stage import REPLAYED, Batch, Stage

from . import config as configs
from .base import Running, token_loss
from .optimizers import adamw
from .selection import parameters

Gradient = list[Tensor]  # one tensor a parameter


class PcGrad(Running):
    """A task is an index of Batch.task; replayed rows are one task. Its gradient is that of its part of the batch's mean
    loss a token, so that the sum is the plain gradient where nothing conflicts.

    Micro-batches, and ranks, are added up a task first; the sums are projected once a step, in the tasks' order.
    """

    config: configs.PcGrad

    def __init__(self, config: configs.PcGrad, stage: Stage) -> None:
        super().__init__(config, stage)
        self.replay = config.share if len(stage.tasks) == 1 else 0.0
        self._params = parameters(self.optimizer)
        self._gradients: dict[int, Gradient] = {}  # by task, of the step under way
        self._step = 0

    def make_optimizer(self) -> torch.optim.Optimizer:
        return adamw(self.stage)

    def backward(self, batch: Batch, weight: float) -> Tensor:
        learned = batch.answer_tokens()
        total, loss = int(learned.sum()), torch.zeros((), dtype=torch.float64, device=learned.device)
        for task in batch.task.unique().tolist():  # ascending
            rows = batch.task == task
            tokens = int(learned[rows].sum())
            if not tokens:
                continue  # its mean would be 0 / 0
            part = token_loss(self.stage.model, batch.rows(rows)) * (tokens / total)
            self._add(task, torch.autograd.grad(part * weight, self._params, materialize_grads=True))
            loss += part.detach()
        return loss

    def _add(self, task: int, gradient: Sequence[Tensor]) -> None:
        if task not in self._gradients:
            self._gradients[task] = list(gradient)
        else:
            for held, more in zip(self._gradients[task], gradient, strict=True):
                held += more

    def gather(self) -> None:
        ranks, tasks = self.stage.ranks, range(REPLAYED, len(self.stage.tasks))
        anywhere = ranks.sums([task in self._gradients for task in tasks])
        gradients = []
        for task in (task for task, count in zip(tasks, anywhere, strict=True) if count):
            own = self._gradients.get(task)
            gradients.append([torch.zeros_like(one) for one in self._params] if own is None else own)
            ranks.add(gradients[-1])
        if not gradients:
            return  # no token of the step is learned
        order = random.Random(step_seed(self.stage.seed, self._step))
        for param, gradient in zip(self._params, surgery(gradients, order), strict=True):
            param.grad = gradient

    def step(self, step: int) -> None:
        self.optimizer.step()
        self._gradients.clear()
        self._step = step + 1

    def extra_bytes(self) -> dict[str, int]:
        tasks = len(self.stage.tasks) + bool(self.replay)
        return {"task_gradients": tasks * sum(param.nbytes for param in self._params)}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["step"]


def surgery(gradients: Sequence[Gradient], order: random.Random) -> Gradient:
    """The sum over tasks of g_i, from which, for every other task j in random order, its part along g_j is taken where
    the two point apart. Of all parameters together, not of each; the g_j are as they were."""
    summed = [torch.zeros_like(one) for one in gradients[0]]
    for i, own in enumerate(gradients):
        others = [j for j in range(len(gradients)) if j != i]
        order.shuffle(others)
        projected = [one.clone() for one in own]
        for other in (gradients[j] for j in others):
            along = _dot(projected, other)
            if along < 0:
                scale = -along / _dot(other, other)
                for one, theirs in zip(projected, other, strict=True):
                    one.add_(theirs, alpha=scale)
        for total, one in zip(summed, projected, strict=True):
            total += one
    return summed


def _dot(a: Gradient, b: Gradient) -> float:
    products = [torch.sum(x.float() * y.float(), dtype=torch.float64) for x, y in zip(a, b, strict=True)]
    return float(torch.stack(products).sum())
