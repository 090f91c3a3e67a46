"""Batches of a stage: every one a pure function of (seed, step), so that a stopped run goes on with the same ones.

A mixture is the tasks' examples joined and shuffled, anew every epoch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from epi_kernels.finetune.chat import Encoded
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.evaluate import make_batch
from epi_kernels.repro.stage import REPLAYED, Batch


class Batches:
    """Examples of a stage's tasks, in the order in which they are learned.

    Args:
        examples: encoded training examples, one list a task.
        batch: rows of a step.
        pad: token that fills rows up; nothing attends to it.
        replayed: examples of earlier stages' tasks, of which `replay` (a share) of every batch is taken.
    """

    def __init__(
        self,
        examples: Sequence[Sequence[Encoded]],
        batch: int,
        seed: int,
        pad: int,
        *,
        replayed: Sequence[Encoded] = (),
        replay: float = 0.0,
    ) -> None:
        if not all(examples):
            raise ReproError("a task has no training example left; raise its share, or max_length")
        if replay and not replayed:
            raise ReproError("nothing to replay: the stage has no stage before it that learned a task")
        self._rows = [(one, task) for task, part in enumerate(examples) for one in part]
        self._by_task = [
            [i for i, (_, of) in enumerate(self._rows) if of == task] for task in range(len(examples))
        ]
        self._batch, self._seed, self._pad = batch, seed, pad
        self._replayed, self._replay = [(one, REPLAYED) for one in replayed], replay
        self._orders: dict[str, tuple[int, list[int]]] = {}  # purpose -> (epoch, permutation)

    def __len__(self) -> int:
        """Examples."""
        return len(self._rows)

    def steps(self, epochs: float) -> int:
        return max(1, math.ceil(epochs * len(self) / self._batch))

    def batch(self, step: int, device: torch.device) -> Batch:
        """The rows of a step, `replay` of them from earlier stages."""
        # So that the share is met over the steps where a batch's part is no whole number.
        again = math.floor((step + 1) * self._replay * self._batch) - math.floor(
            step * self._replay * self._batch
        )
        drawn = math.floor(step * self._replay * self._batch)
        first = step * self._batch - drawn
        rows = [self._rows[i] for i in self._take("train", len(self._rows), first, self._batch - again)]
        rows += [self._replayed[i] for i in self._take("replay", len(self._replayed), drawn, again)]
        return self._batch_of(rows, device)

    def probe(self, task: int | None, index: int, rows: int, device: torch.device) -> Batch:
        """Training examples of one task, or of the mixture; see `measure.Probes`. Raises ReproError."""
        of = range(len(self._rows)) if task is None else self._by_task[task]
        if (index + 1) * rows > len(of):
            raise ReproError(
                f"a measurement needs {(index + 1) * rows} training examples of its own, there are {len(of)}"
            )
        name = "probe" if task is None else f"probe {task}"
        return self._batch_of(
            [self._rows[of[i]] for i in self._take(name, len(of), index * rows, rows)], device
        )

    def _take(self, purpose: str, n: int, first: int, count: int) -> list[int]:
        """Places first .. first+count of an endless sequence of permutations of n."""
        return [self._order(purpose, n, at // n)[at % n] for at in range(first, first + count)]

    def _order(self, purpose: str, n: int, epoch: int) -> list[int]:
        known = self._orders.get(purpose)
        if known is None or known[0] != epoch:
            rng = torch.Generator().manual_seed(_seed_of(purpose, self._seed, epoch))
            known = self._orders[purpose] = epoch, torch.randperm(n, generator=rng).tolist()
        return known[1]

    def _batch_of(self, rows: Sequence[tuple[Encoded, int]], device: torch.device) -> Batch:
        return make_batch([one for one, _ in rows], self._pad, device, [task for _, task in rows])


class StageProbes:
    """`measure.Probes` of a stage."""

    def __init__(
        self, batches: Batches, held_out: Sequence[Sequence[Encoded]], pad: int, device: torch.device
    ) -> None:
        self._batches, self._held_out, self._pad, self._device = batches, held_out, pad, device

    def batch(self, task: int | None, index: int, rows: int) -> Batch:
        return self._batches.probe(task, index, rows, self._device)

    def validation(self, rows: int) -> Batch:
        share = max(1, rows // len(self._held_out))
        chosen = [(one, task) for task, part in enumerate(self._held_out) for one in part[:share]]
        return make_batch([one for one, _ in chosen], self._pad, self._device, [task for _, task in chosen])


def _seed_of(purpose: str, seed: int, epoch: int) -> int:
    """Unrelated permutations for unrelated purposes; stable over processes, unlike hash()."""

    return int.from_bytes(hashlib.sha256(f"{purpose} {seed} {epoch}".encode()).digest()[:8], "big") >> 1
