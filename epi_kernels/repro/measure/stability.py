"""Whether a refresh of the mask shakes the training: what is seen just before it and just after.

Row s holds what belongs to the weights after step s: the size of the update that led to them, ||theta_s -
theta_(s-1)|| over all trained elements; the loss and the gradient's norm (before clipping) of the next step, which
are taken at them; the loss on a fixed held-out batch. The mask of a refresh after step r acts from step r + 1 on, so
rows r-k+1 .. r are before it and r+1 .. r+k after. The same is done midway between refreshes, where nothing happens:
a control for what a trend or the schedule of the learning rate does to the ratio after / before.

Rows are made in these windows alone: a step there costs a copy of the weights and a forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from epi_kernels.repro.config import Count, Strict
from epi_kernels.repro.measure.base import Probes
from epi_kernels.repro.measure.passes import held_out_loss, trainable
from epi_kernels.repro.measure.refreshes import RefreshWatch
from epi_kernels.repro.stage import Batch, Stage

REFRESH, PLACEBO = "refresh", "placebo"
STATISTICS = ("loss", "validation", "grad_norm", "update")


class StabilityOptions(Strict):
    window: Count = 5  # steps before and after; at most a quarter of the interval, so that windows stay apart
    rows: Count | None = None  # of the held-out batch; None: the recipe's batch


def update_size(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """||after - before|| over all tensors: differences in float32, added up in float64."""
    sizes = [torch.linalg.vector_norm(new.float() - old.float()).double() for old, new in zip(before, after)]
    return float(torch.linalg.vector_norm(torch.stack(sizes)))


class Stability:
    """Record: ``rows`` (step, and the statistics); ``events`` (step, kind, half = k there, and of each statistic the
    ``before`` and ``after`` means and their ``ratio``); ``mean``: by kind the mean ratio of each statistic and n.

    An event whose windows the stage does not hold whole is left out: the first mask of carried importance, say.
    """

    def __init__(self, stage: Stage, data: Probes, options: StabilityOptions) -> None:
        self._data, self._options = data, options
        self._watch = RefreshWatch()
        self._rows: dict[int, dict[str, float]] = {}
        self._events: list[tuple[int, str, int]] = []  # step, kind, half
        self._ahead: list[tuple[int, str, int]] = []  # the next refresh by plan, and the placebo before it
        self._weights: list[Tensor] | None = None  # within a step alone
        self._held_out: Batch | None = None

    def before_step(self, stage: Stage, step: int) -> None:
        if step == 0:
            self._watch.new(stage, 0)
            self._plan(stage)
        if step in self._rows:  # taken at the weights after `step` steps
            self._rows[step] |= {"loss": float(stage.loss), "grad_norm": float(stage.grad_norm)}
        if self._in_window(step + 1):
            self._weights = [param.detach().clone() for param in trainable(stage).values()]

    def after_step(self, stage: Stage, step: int) -> None:
        done = step + 1
        if self._weights is not None:
            now = [param.detach() for param in trainable(stage).values()]
            if self._held_out is None:
                self._held_out = self._data.validation(self._options.rows or stage.recipe.batch)
            self._rows[done] = {
                "update": update_size(self._weights, now),
                "validation": held_out_loss(stage, self._held_out),
            }
            self._weights = None
        report = self._watch.new(stage, done)
        if report is not None:
            placebo = [event for event in self._ahead if event[1] == PLACEBO and event[0] < done]
            planned = [half for at, kind, half in self._ahead if kind == REFRESH]
            self._events += [
                *placebo,
                (done, REFRESH, planned[0] if planned else self._half(self._watch.interval)),
            ]
            self._plan(stage)

    def _half(self, interval: int | None) -> int:
        return min(self._options.window, max(1, (interval or 1) // 4))

    def _plan(self, stage: Stage) -> None:
        due = self._watch.next_due(stage)
        if due is None:
            self._ahead = []
            return
        last = max(self._watch.last, 0)
        half = self._half(due - last)
        self._ahead = [(due, REFRESH, half)]
        if self._watch.last >= 0:  # before the first mask there is nothing to compare with
            self._ahead.append((last + (due - last) // 2, PLACEBO, half))

    def _in_window(self, step: int) -> bool:
        return any(at - half < step <= at + half for at, _, half in [*self._events, *self._ahead])

    def record(self) -> dict[str, Any]:
        # the last placebo may be over though no refresh follows it any more
        events = [*self._events, *(event for event in self._ahead if event[1] == PLACEBO)]
        rows = [self._event(*event) for event in events]
        whole = [row for row in rows if row is not None]
        return {
            "window": self._options.window,
            "rows": [{"step": step} | row for step, row in sorted(self._rows.items())],
            "events": whole,
            "mean": {
                kind: _mean_ratios([row for row in whole if row["kind"] == kind])
                for kind in (REFRESH, PLACEBO)
            },
        }

    def _event(self, at: int, kind: str, half: int) -> dict[str, Any] | None:
        before = [self._rows.get(step, {}) for step in range(at - half + 1, at + 1)]
        after = [self._rows.get(step, {}) for step in range(at + 1, at + half + 1)]
        if any(name not in row for row in (*before, *after) for name in STATISTICS):
            return None
        means = {
            "before": {name: math.fsum(row[name] for row in before) / half for name in STATISTICS},
            "after": {name: math.fsum(row[name] for row in after) / half for name in STATISTICS},
        }
        ratio = {
            name: means["after"][name] / means["before"][name] if means["before"][name] else None
            for name in STATISTICS
        }
        return {"step": at, "kind": kind, "half": half, **means, "ratio": ratio}

    def state_dict(self) -> dict[str, Any]:
        return {
            "watch": self._watch.state_dict(),
            "rows": {step: dict(row) for step, row in self._rows.items()},
            "events": list(self._events),
            "ahead": list(self._ahead),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._watch.load_state_dict(state["watch"])
        self._rows, self._events, self._ahead = state["rows"], state["events"], state["ahead"]


def _mean_ratios(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mean: dict[str, Any] = {"n": len(events)}
    for name in STATISTICS:
        ratios = [event["ratio"][name] for event in events if event["ratio"][name] is not None]
        mean[name] = math.fsum(ratios) / len(ratios) if ratios else None
    return mean
