"""A tiny training run for observers to watch: two tasks, a Llama with dropout, the loop's order of calls."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from epi_kernels import MaskedEMAAdamW
from epi_kernels.repro.config import Recipe
from epi_kernels.repro.measure import make_observer
from epi_kernels.repro.methods.base import token_loss
from epi_kernels.repro.stage import Batch, Stage
from python_tests.tiny_model import backend, tiny_llama

ROWS, LENGTH, VOCABULARY = 4, 10, 40
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}


class Data:
    """Random tokens, by the arguments alone; a task has a range of tokens of its own."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []

    def batch(self, task: int | None, index: int, rows: int) -> Batch:
        self.asked.append((task, index, rows))
        return self._draw(1 + index + 100 * (0 if task is None else 1 + task), task, rows)

    def validation(self, rows: int) -> Batch:
        return self._draw(77, None, rows)

    def training(self, step: int) -> Batch:
        return self._draw(10_000 + step, None, ROWS)

    def _draw(self, seed: int, task: int | None, rows: int) -> Batch:
        rng = torch.Generator().manual_seed(seed)
        tasks = torch.arange(rows) % 2 if task is None else torch.full((rows,), task)
        half = VOCABULARY // 2
        tokens = torch.randint(0, half, (rows, LENGTH), generator=rng) + half * tasks[:, None]
        labels = tokens.clone()
        labels[:, : LENGTH // 2] = -100
        return Batch(tokens, labels, torch.ones_like(tokens), tasks)


def masked(model, **options):
    options = {"isolation_ratio": 0.1, "mask_interval": 2} | options
    return MaskedEMAAdamW(model.named_parameters(), lr=1e-2, backend=backend(), **options)


def plain(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def make_stage(
    steps: int, optimizer=masked, *, dropout: float = 0.1, interval: int | None = 2, **recipe
) -> Stage:
    stage = Stage(
        model=tiny_llama(attention_dropout=dropout, **SMALL),
        recipe=Recipe(lr=1e-2, steps=steps, batch=ROWS, **recipe),
        steps=steps,
        seed=0,
        device=torch.device("cpu"),
        tasks=("one", "two"),
    )
    config = SimpleNamespace() if interval is None else SimpleNamespace(interval=interval)
    stage.method = SimpleNamespace(
        optimizer=optimizer(stage.model), config=config, extra_bytes=lambda: {"anchor": 12, "other": 1}
    )
    return stage


def train(stage: Stage, data: Data, observers, first: int = 0, last: int | None = None, each=None) -> None:
    """Steps first .. last - 1; ``each(step)`` after every one."""
    for step in range(first, stage.steps if last is None else last):
        stage.optimizer.zero_grad()
        stage.batch = data.training(step)
        loss = token_loss(stage.model, stage.batch)
        loss.backward()
        stage.loss = float(loss.detach())
        clip = stage.recipe.clip or float("inf")
        stage.grad_norm = float(torch.nn.utils.clip_grad_norm_(stage.model.parameters(), clip))
        for observer in observers:
            observer.before_step(stage, step)
        stage.optimizer.step()
        for observer in observers:
            observer.after_step(stage, step)
        if each is not None:
            each(step)


def observe(stage: Stage, *names: str):
    data = Data()
    return data, [make_observer(name, stage, data) for name in names]


def carried(stage: Stage) -> None:
    """Importance of a step of another optimizer, isolated before the first step."""
    weights = [param.detach().clone() for param in stage.model.parameters()]
    other = masked(stage.model)
    for seed, param in enumerate(stage.model.parameters()):
        param.grad = 0.01 * torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
    other.step()
    with torch.no_grad():
        for param, weight in zip(stage.model.parameters(), weights):
            param.copy_(weight)
    stage.optimizer.carry_importance(other)
    stage.optimizer.refresh_isolation_mask()
