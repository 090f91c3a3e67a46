"""What all kinds of runs share: where they are made, the tasks' examples, scores, and how a model is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from epi_kernels.finetune.chat import Encoding
from epi_kernels.finetune.data import Example
from epi_kernels.finetune.ranks import Ranks
from epi_kernels.optim import MaskedEMAAdamW
from epi_kernels.optim.exchange import save_isolation
from epi_kernels.repro import lm_eval
from epi_kernels.repro.config import TaskSpec
from epi_kernels.repro.evaluate import encode_task, evaluate
from epi_kernels.repro.store import ISOLATION, Store
from epi_kernels.repro.tasks import PICTURED, SYNTHETIC, Task, make_task
from epi_kernels.repro.tasks.chat import Judged
from epi_kernels.repro.train import Limits

EVALUATION_ROWS = 200  # of a forward pass, at most: `evaluate.portions`
RATINGS = "ratings.jsonl"  # in the store: what a judge said is never asked again


@dataclass(frozen=True)
class Workshop:
    """A store, a device, and when to stop; the ranks that make each run together, of which the first writes."""

    store: Store
    device: torch.device
    limits: Limits = field(default_factory=Limits)
    keep: frozenset[str] = frozenset()  # keys of the runs whose weights others start from
    ranks: Ranks = field(default_factory=Ranks)
    fsdp: bool = False  # stages are sharded over the ranks while they train
    part_of: str | None = None  # key of the CPI-FT run that what is made is a part of

    @property
    def sharded(self) -> bool:
        return self.fsdp and self.ranks.size > 1

    @property
    def loads_to(self) -> torch.device:
        """Where a model lies before its stage: one that is to be sharded need not fit the device with its states."""
        return torch.device("cpu") if self.sharded else self.device


@dataclass
class Result:
    """What came out of a run; ``facts`` are further fields of the manifest."""

    scores: dict[str, float]
    losses: dict[str, float]
    write_model: Callable[[Path], None]
    facts: dict[str, Any] = field(default_factory=dict)
    # to the seconds of this call: what it took before it was stopped; of a run made of parts, theirs less what passed here
    added_s: float = 0.0


Split = Literal["train", "test"]


def examples_of(spec: TaskSpec, seed: int, split: Split) -> tuple[Task, Sequence[Example]]:
    """A task and one of its splits, read once a process. Raises ReproError."""
    return _examples(spec, _drawn(spec, seed), split)  # pyright: ignore[reportArgumentType]  # frozen, so hashable


def encoded(tokenizer: Any, spec: TaskSpec, seed: int, max_length: int, split: Split = "train") -> Encoding:
    """A split's tokens, made once a process. Raises ReproError."""
    return _encoded(tokenizer, spec, _drawn(spec, seed), max_length, split)  # pyright: ignore[reportArgumentType]


def _drawn(spec: TaskSpec, seed: int) -> int:
    """Real tasks have the same examples for all seeds: gigabytes of tokens, once."""
    return seed if spec.kind in SYNTHETIC | PICTURED else 0


@lru_cache(maxsize=64)
def _examples(spec: Any, seed: int, split: Split) -> tuple[Task, Sequence[Example]]:
    task = make_task(spec, seed)
    return task, task.examples(split)


@lru_cache(maxsize=32)
def _encoded(tokenizer: Any, spec: Any, seed: int, max_length: int, split: Split) -> Encoding:
    return encode_task(tokenizer, examples_of(spec, seed, split)[1], max_length)


def scores_of(
    model: Any, tokenizer: Any, specs: Sequence[TaskSpec], seed: int, shop: Workshop
) -> tuple[dict[str, float], dict[str, float]]:
    """(scores, held-out losses) by kind of task, the same on every rank. Raises UserError."""
    scores, losses = {}, {}
    for spec in specs:
        if spec.harness == "lm-eval":
            scores[spec.kind] = shop.ranks.first_does(lm_eval.score, spec, model, tokenizer)
            continue
        task, examples = shop.ranks.together(examples_of, spec, seed, "test")
        if isinstance(task, Judged):
            task.kept = shop.store.folder / RATINGS
        scores[spec.kind], losses[spec.kind] = evaluate(
            model, tokenizer, task, examples, shop.device, EVALUATION_ROWS, ranks=shop.ranks
        )
    return scores, losses


def model_writer(
    model: Any, tokenizer: Any, optimizer: torch.optim.Optimizer | None = None, isolation: Path | None = None
) -> Callable[[Path], None]:
    """Writes what others start from: a folder that loads with transformers, and the importance where there is one, of
    `optimizer` or from a file that is there and goes."""

    def write(folder: Path) -> None:
        # Under the model's own names, which cores and importance go by, whatever its family's files call them.
        model.save_pretrained(folder, save_original_format=False)
        tokenizer.save_pretrained(folder)
        if isolation is not None:
            shutil.move(isolation, folder / ISOLATION)
        elif isinstance(optimizer, MaskedEMAAdamW):
            save_isolation(optimizer, folder / ISOLATION)

    return write
