"""Several examples in one row, without a leak between them; the order of batches as a pure function of seed and step.

Positions restart at 0 in every example. With `attention_mask=None` and no cache, transformers (5.x) reads example
boundaries from `position_ids` and builds block-diagonal masks for "sdpa" and "eager". "flash_attention_2" takes
variable-length segments from them, but only in a batch of one row: all rows are joined for it. Models without
attention (recurrent ones) ignore positions and would leak: `assert_no_leak` tries the model at hand before training.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .chat import IGNORE, Encoded
from .errors import UserError

ATTENTION = ("sdpa", "eager", "flash_attention_2")
OPEN_ROWS = (
    64  # rows tried for each example: bounds the packing's cost, fills rows to 95 % and more on mixed lengths
)


def pack(lengths: Sequence[int], capacity: int, seed: int, packing: bool = True) -> list[list[int]]:
    """Rows of example indices whose lengths add up to at most `capacity` (first fit over a seeded shuffle)."""
    order = list(range(len(lengths)))
    random.Random(f"packing {seed}").shuffle(order)
    if not packing:
        return [[index] for index in order]
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (row, tokens left), the open rows
    for index in order:
        for slot, (row, left) in enumerate(free):
            if lengths[index] <= left:
                rows[row].append(index)
                free[slot] = (row, left - lengths[index])
                break
        else:
            rows.append([index])
            free.append((len(rows) - 1, capacity - lengths[index]))
            if len(free) > OPEN_ROWS:
                free.remove(min(free, key=lambda one: one[1]))
    return rows


@dataclass(frozen=True)
class Schedule:
    """Which rows make up which step. Stateless: step k is the same whether or not a run was interrupted before it."""

    rows: int
    batch_size: int  # rows a micro-batch
    accumulation: int  # micro-batches a step; the last step of an epoch may have fewer
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // (self.batch_size * self.accumulation))

    def micro_batches(self, step: int, rank: int = 0, ranks: int = 1) -> list[list[int]]:
        """Row indices of each micro-batch of `step` (0, 1, ...).

        Of several ranks each takes every `ranks`-th row, at most `batch_size` at once: together the rows of one process,
        in as few passes as there can be. All ranks have as many micro-batches, of which the last may be empty.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.rows, self.seed, epoch)
        size = self.batch_size * self.accumulation
        every = order[within * size : (within + 1) * size]
        mine, most = every[rank::ranks], -(-len(every) // ranks)
        return [list(mine[i : i + self.batch_size]) for i in range(0, most, self.batch_size)]


@functools.lru_cache(maxsize=1)  # the current epoch's: shuffling a million rows takes a second
def _epoch_order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(rows))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return tuple(order)


def collate(
    rows: Sequence[Sequence[Encoded]],
    pad_id: int,
    packing: bool,
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
) -> dict[str, torch.Tensor]:
    """One micro-batch: input_ids, labels, position_ids (all [rows, longest] int64); unpacked rows get an attention_mask.

    In packed rows the padding at the end is a segment of its own, so it needs no mask.
    """
    if packing and attention == "flash_attention_2":
        rows = [[one for row in rows for one in row]]
    width = max(sum(len(one.input_ids) for one in row) for row in rows)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        ids = [token for one in row for token in one.input_ids]
        padding = width - len(ids)
        batch["input_ids"].append(ids + [pad_id] * padding)
        batch["labels"].append([label for one in row for label in one.labels] + [IGNORE] * padding)
        batch["position_ids"].append(
            [position for one in row for position in range(len(one.input_ids))] + list(range(padding))
        )
    result = {name: torch.tensor(values, dtype=torch.int64, device=device) for name, values in batch.items()}
    if not packing:
        lengths = torch.tensor([len(row[0].input_ids) for row in rows], device=device)
        result["attention_mask"] = (torch.arange(width, device=device)[None, :] < lengths[:, None]).long()
        del result["position_ids"]
    return result


@torch.no_grad()
def assert_no_leak(model, vocab_size: int, attention: str = "sdpa") -> None:
    """Raises UserError when, in this model, a packed example sees another of its row or its batch."""
    was_training = model.training
    model.eval()
    try:
        first = next(model.parameters())
        samples = [[(7 * i + 11 * start + 1) % vocab_size for i in range(6)] for start in range(4)]
        seen = []
        for change in (0, 1):
            changed = [(token + change) % vocab_size for token in samples[0]]
            every = [Encoded(ids, [IGNORE] * 6) for ids in (changed, *samples[1:])]
            batch = collate([every[:2], every[2:]], 0, packing=True, device=first.device, attention=attention)
            del batch["labels"]
            # All but the changed example, whatever the layout.
            seen.append(model(**batch, use_cache=False).logits.reshape(24, -1)[6:].float())
        # Equal bits on CPUs; a GPU's batched kernels may round differently, a leak is far larger.
        difference = (seen[0] - seen[1]).abs().max() / seen[0].std().clamp_min(1e-20)
        leaks = not difference <= (1e-4 if first.dtype == torch.float32 else 2e-2)
    except TypeError as error:
        raise UserError(
            f"{type(model).__name__} does not take position_ids ({error}): pass --no-packing"
        ) from None
    finally:
        model.train(was_training)
    if leaks:
        raise UserError(
            f"{type(model).__name__} lets packed examples see each other "
            f"(logits move by {difference:.2g} of their spread): pass --no-packing"
        )
