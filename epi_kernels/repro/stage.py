"""A stage under way: what methods and observers see of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epi_kernels.finetune.chat import IGNORE
from epi_kernels.finetune.ranks import Ranks
from epi_kernels.repro.config import Recipe

REPLAYED = -1  # Batch.task of an example of an earlier stage


class Batch(NamedTuple):
    """Padded on the right; a row is one example."""

    input_ids: Tensor  # [rows, length] int64
    labels: Tensor  # [rows, length] int64, -100 where nothing is learned, else the token that stands there
    attention_mask: Tensor  # [rows, length] int64
    task: Tensor  # [rows] int64, index into the stage's tasks, or REPLAYED
    pictures: Tensor | None = None  # [rows, 3, height, width] uint8; None: text alone

    def answer_tokens(self) -> Tensor:
        """[rows] int64: how many of a row's tokens are learned."""
        return (self.labels[:, 1:] != IGNORE).sum(1)

    def rows(self, chosen: Tensor | slice) -> Batch:
        return self._each(lambda part: part[chosen])

    def to(self, device: torch.device) -> Batch:
        """On a GPU from page-locked memory, so that the copy waits for nothing."""
        if device.type != "cuda":
            return self._each(lambda part: part.to(device))
        return self._each(lambda part: part.pin_memory().to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        pictures = None if self.pictures is None else change(self.pictures)
        ids, labels, mask, task = map(change, self[:4])
        return Batch(ids, labels, mask, task, pictures)


@dataclass
class Stage:
    """The model and everything around it while one `Train` run goes on."""

    model: Any  # a transformers causal language model, in training mode
    recipe: Recipe
    steps: int
    seed: int
    device: torch.device
    tasks: Sequence[str]  # kinds, by the index of Batch.task
    before: Path | None = None  # folder of the run before: `store` says what it holds
    origin: Path | None = None  # folder of the run before that one (theta_0 of |theta - theta_0|)
    replayed: Sequence[Any] = ()  # encoded examples of earlier stages' tasks; for methods that ask for them
    # Both 0-d on the device, so that whoever reads them waits for the step, and no one else.
    loss: Tensor | float = 0.0  # of the step under way, nats a token
    grad_norm: Tensor | float = 0.0  # before clipping
    batch: Batch | None = None  # of the step under way (all micro-batches)
    method: Any = field(default=None)  # methods.base.Running
    ranks: Ranks = field(default_factory=Ranks)  # each takes its part of every step's rows
    sharded: bool = False  # each has a part of the weights, gradients and states too

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.method.optimizer


def seed_random(device: torch.device, seed: int) -> None:
    """What is drawn on the CPU and on `device`, as torch.manual_seed does for every kind of device there could be, which
    takes a stack trace for each that is not in use."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
