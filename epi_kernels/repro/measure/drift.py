"""How far the important elements of a model move while it is trained.

At given weights the importance is measured twice, on disjoint fixed batches A and B (`importance`: mean squared batch
gradient, min-max within each tensor, the top p of all), so that at t steps

    ceiling                 J(A_t, B_t)      the same weights, other batches: what noise alone leaves of 1
    from_start              J(A_0, A_t)      the same batches: 1 at t = 0
    from_start_other        J(B_0, A_t)      other batches: the ceiling at t = 0, and what to hold against it
    successive              J(A_s, A_t)      s: the point before
    chance                  of two random sets of the sizes of A_0 and A_t

each over all elements and by kind of parameter. Beside it, where the optimizer has a mask that evolves, the overlap of
its mask with its own first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from epi_kernels.isolation.overlap import jaccard
from epi_kernels.repro.config import Count, Share, Strict
from epi_kernels.repro.measure.base import Probes
from epi_kernels.repro.measure.importance import (
    Masks,
    counts,
    elements_by_kind,
    intersection,
    isolated_now,
    mean_squared_gradient,
    top_set,
)
from epi_kernels.repro.stage import Stage
from epi_kernels.scores import chance_jaccard

Several = BeforeValidator(lambda value: value.split("+") if isinstance(value, str) else value)


class DriftOptions(Strict):
    every: Count = 50  # steps between points; there is one before the first step and one after the last too
    ratios: Annotated[tuple[Share, ...], Several, Field(min_length=1)] = (0.01, 0.1)
    batches: Count = 8  # of A, and as many of B; each of the recipe's size


def overlap(first: Masks, second: Masks) -> dict[str, float]:
    """Jaccard over all elements and by kind of parameter."""
    both, one, other = counts(intersection(first, second)), counts(first), counts(second)
    return {kind: jaccard(both[kind], one[kind], other[kind]) for kind in both}


def shares(masks: Masks, elements: Mapping[str, int]) -> dict[str, float]:
    return {kind: count / elements[kind] for kind, count in counts(masks).items()}


class Drift:
    """Record: ``elements`` by kind; ``ratios``: by p (as text) a list of points (step = steps done, the overlaps
    above, ``share`` of the elements that A_t holds, by kind); ``optimizer``: a list of points (step, from_first, share).
    """

    def __init__(self, stage: Stage, data: Probes, options: DriftOptions) -> None:
        self._data, self._options = data, options
        self._elements: dict[str, int] = {}
        self._start: dict[str, dict[str, Masks]] = {}  # by ratio: {"A": ..., "B": ...} at t = 0
        self._last: dict[str, Masks] = {}  # by ratio: A at the point before
        self._points: dict[str, list[dict[str, Any]]] = {str(p): [] for p in options.ratios}
        self._first_mask: Masks | None = None
        self._mask_points: list[dict[str, Any]] = []

    def before_step(self, stage: Stage, step: int) -> None:
        if step == 0:
            self._measure(stage, 0)

    def after_step(self, stage: Stage, step: int) -> None:
        done = step + 1
        if done % self._options.every == 0 or done == stage.steps:
            self._measure(stage, done)

    def _measure(self, stage: Stage, done: int) -> None:
        self._elements = elements_by_kind(stage)
        found = {"A": self._top_sets(stage, 0), "B": self._top_sets(stage, 1)}
        for p, points in self._points.items():
            now = {side: sets[p] for side, sets in found.items()}
            start = self._start.setdefault(p, now)
            point = {
                "step": done,
                "ceiling": overlap(now["A"], now["B"]),
                "from_start": overlap(start["A"], now["A"]),
                "from_start_other": overlap(start["B"], now["A"]),
                "share": shares(now["A"], self._elements),
            }
            before = shares(start["A"], self._elements)
            point["chance"] = {
                kind: chance_jaccard(before[kind], share) for kind, share in point["share"].items()
            }
            if p in self._last:
                point["successive"] = overlap(self._last[p], now["A"])
            self._last[p] = now["A"]
            points.append(point)
        self._measure_mask(stage, done)

    def _top_sets(self, stage: Stage, side: int) -> dict[str, Masks]:
        """By ratio, of the batches of A (0) or B (1)."""
        first, rows = side * self._options.batches, stage.recipe.batch
        batches = (self._data.batch(None, first + i, rows) for i in range(self._options.batches))
        importance = mean_squared_gradient(stage, batches)
        return {str(p): top_set(importance, p) for p in self._options.ratios}

    def _measure_mask(self, stage: Stage, done: int) -> None:
        mask = isolated_now(stage)
        if mask is None:
            return
        if self._first_mask is None:
            self._first_mask = mask
        self._mask_points.append(
            {
                "step": done,
                "from_first": overlap(self._first_mask, mask),
                "share": shares(mask, self._elements),
            }
        )

    def record(self) -> dict[str, Any]:
        return {
            "every": self._options.every,
            "batches": self._options.batches,
            "elements": self._elements,
            "ratios": self._points,
            "optimizer": self._mask_points,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "elements": dict(self._elements),
            "start": dict(self._start),
            "last": dict(self._last),
            "points": {p: list(points) for p, points in self._points.items()},
            "first_mask": self._first_mask,
            "mask_points": list(self._mask_points),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._elements, self._start, self._last = state["elements"], state["start"], state["last"]
        self._points, self._first_mask = state["points"], state["first_mask"]
        self._mask_points = state["mask_points"]
