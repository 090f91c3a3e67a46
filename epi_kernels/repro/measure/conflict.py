"""How far the gradients of a stage's tasks point against each other.

EPI (arXiv 2604.14010) prints a "gradient conflict score" without defining it. Ours: for tasks i and j, g_i the
gradient of task i's loss on a batch of its own at the weights at hand, c_ij = cos(g_i, g_j),

    score = 100 * mean over pairs of max(0, -c_ij)        share = 100 * (pairs with c_ij < 0) / (pairs)

and of one task the same over the pairs it is in. "all": over all elements, isolated or not: what two methods are
compared by. "free": with the isolated elements left out of every g, which is what conflicts in what may still move;
it is held against "all" at the same weights, not against another method's. A gradient of zeros conflicts with nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from epi_kernels.reference.stats import slices
from epi_kernels.repro.config import Count, Strict
from epi_kernels.repro.measure.base import Probes
from epi_kernels.repro.measure.passes import gradients, trainable
from epi_kernels.repro.stage import Stage


class ConflictOptions(Strict):
    every: Count = 50  # steps
    rows: Count | None = None  # of a task's batch; None: the recipe's


def cosines(gram: Sequence[Sequence[float]]) -> list[list[float]]:
    """From inner products of gradients; 0 where one is zero."""
    norms = [math.sqrt(gram[i][i]) for i in range(len(gram))]
    return [
        [value / (norms[i] * norms[j]) if norms[i] and norms[j] else 0.0 for j, value in enumerate(row)]
        for i, row in enumerate(gram)
    ]


def over_points(points: Sequence[Mapping[str, Any]], of: str, tasks: int) -> dict[str, Any]:
    """Mean ``score`` and ``share`` over a record's points, of "all" or "free" elements; ``by_task`` the same of each."""
    by_task = [[conflict(point[of]["cosines"], task) for point in points] for task in range(tasks)]
    return _mean([point[of] for point in points]) | {"by_task": [_mean(one) for one in by_task]}


def conflict(cosine: Sequence[Sequence[float]], task: int | None = None) -> dict[str, float]:
    """``score`` and ``share`` in %, over all pairs of tasks or those of one."""
    pairs = [cosine[i][j] for i in range(len(cosine)) for j in range(i) if task is None or task in (i, j)]
    return {
        "score": 100 * math.fsum(max(0.0, -c) for c in pairs) / len(pairs),
        "share": 100 * sum(c < 0 for c in pairs) / len(pairs),
    }


class Conflict:
    """Record: ``tasks``; ``points`` (step from 0; of "all" and "free" elements: score, share, and the matrix
    ``cosines``); ``mean`` over the points, and ``by_task``. Nothing but ``tasks`` in a stage of one task.

    Holds one gradient a task at once, in the parameters' dtype.
    """

    def __init__(self, stage: Stage, data: Probes, options: ConflictOptions) -> None:
        self._data, self._options = data, options
        self._tasks = list(stage.tasks)
        self._points: list[dict[str, Any]] = []

    def before_step(self, stage: Stage, step: int) -> None:
        due = step % self._options.every == 0 or step == stage.steps - 1
        if due and len(self._tasks) > 1:
            both = {name: cosines(gram) for name, gram in self._grams(stage).items()}
            self._points.append(
                {"step": step} | {name: conflict(one) | {"cosines": one} for name, one in both.items()}
            )

    def after_step(self, stage: Stage, step: int) -> None:
        pass

    def _grams(self, stage: Stage) -> dict[str, list[list[float]]]:
        """Inner products of the tasks' gradients, float64: over all elements, and over those not isolated."""
        rows = self._options.rows or stage.recipe.batch
        by_task = [gradients(stage, self._data.batch(task, 0, rows)) for task in range(len(self._tasks))]
        mask_of = getattr(stage.optimizer, "isolation_mask", None)
        everything = torch.zeros(len(by_task), len(by_task), dtype=torch.float64, device=stage.device)
        free = torch.zeros_like(everything)
        for param, *parts in zip(trainable(stage).values(), *by_task, strict=True):
            isolated = None if mask_of is None else mask_of(param).reshape(-1)
            flat: list[Tensor] = [part.reshape(-1) for part in parts]
            for start, stop in slices(param.numel()):
                piece = torch.stack([one[start:stop].double() for one in flat])  # [tasks, n]
                everything += piece @ piece.T
                if isolated is not None:
                    piece = piece.masked_fill(isolated[start:stop], 0.0)
                free += piece @ piece.T
        return {"all": everything.tolist(), "free": free.tolist()}

    def record(self) -> dict[str, Any]:
        if not self._points:
            return {"tasks": self._tasks}
        mean = {of: over_points(self._points, of, len(self._tasks)) for of in ("all", "free")}
        return {"tasks": self._tasks, "points": self._points, "mean": mean}

    def state_dict(self) -> dict[str, Any]:
        return {"points": list(self._points)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._points = list(state["points"])


def _mean(points: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {name: math.fsum(point[name] for point in points) / len(points) for name in ("score", "share")}
