"""What a run works on: rows of examples, the options with everything made from them, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from .chat import IGNORE, Encoded
from .options import Options
from .packing import Schedule, collate
from .ranks import Ranks


@dataclass
class Rows:
    """Packed rows of one data set."""

    examples: Sequence[Encoded]
    rows: list[list[int]]

    def batch(
        self, indices: Sequence[int], pad_id: int, packing: bool, device: str, attention: str
    ) -> dict[str, torch.Tensor]:
        rows = [[self.examples[i] for i in self.rows[row]] for row in indices]
        return collate(rows, pad_id, packing, device, attention)


@dataclass
class Job:
    """Everything a run needs that does not change during it."""

    options: Options
    tokenizer: Any
    train: Rows
    validation: Rows | None
    retain: Rows | None
    schedule: Schedule
    steps: int
    pad_id: int
    device: str
    fingerprints: dict[str, str] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=Ranks)

    def batch(self, rows: Rows, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        return rows.batch(indices, self.pad_id, self.options.packing, self.device, self.options.attention)

    def micro_batches(self, step: int) -> list[dict[str, torch.Tensor]]:
        """This rank's of a step."""
        batches = []
        for rows in self.schedule.micro_batches(step, self.ranks.rank, self.ranks.size):
            if rows:
                batches.append(self.batch(self.train, rows))
            elif self.sharded:  # other ranks' passes ask for this one's weights: a pass without a loss
                batches.append(self.batch(self.train, [0]))
                batches[-1]["labels"].fill_(IGNORE)
        return batches

    @property
    def sharded(self) -> bool:
        return self.options.fsdp and self.ranks.size > 1

    @property
    def eval_every(self) -> int:
        return self.options.eval_every or max(1, self.steps // 10)


def answer_loss(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """(summed cross-entropy in nats, number of answer tokens), logits in float32 at the answers alone."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    learned = labels != IGNORE
    return F.cross_entropy(logits[learned].float(), labels[learned], reduction="sum"), int(learned.sum())


@torch.no_grad()
def evaluate(model, rows: Rows | None, job: Job) -> float | None:
    """Mean nats an answer token; None without data. Ranks take the batches of one process in turn: the same bits."""
    if rows is None:
        return None
    model.eval()
    size, ranks = job.options.batch_size, job.ranks
    batches = [range(start, min(start + size, len(rows.rows))) for start in range(0, len(rows.rows), size)]
    losses, tokens = [0.0] * len(batches), [0] * len(batches)
    for first in range(0, len(batches), ranks.size):
        number = first + ranks.rank
        if number < len(batches):
            loss, tokens[number] = answer_loss(model, job.batch(rows, batches[number]))
            losses[number] = float(loss)
        elif job.sharded:  # other ranks' passes ask for this one's weights
            answer_loss(model, job.batch(rows, batches[0]))
    model.train()
    found = ranks.sums([*losses, *tokens])  # each is one rank's: nothing is rounded
    return sum(found[: len(batches)]) / max(1, sum(found[len(batches) :]))
