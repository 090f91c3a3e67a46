"""The course of a stage: loss, gradient norm, learning rate; and what each refresh of the mask did."""

from __future__ import annotations

from typing import Any

from epi_kernels.repro.config import Count, Strict
from epi_kernels.repro.measure.base import Probes
from epi_kernels.repro.measure.refreshes import RefreshWatch
from epi_kernels.repro.stage import Stage

POINTS = 200  # of a curve, about


class CurveOptions(Strict):
    every: Count | None = None  # steps between points; None: about POINTS points


class Curve:
    """Record: ``every``; ``points`` (step from 0, loss in nats a token, grad_norm before clipping, lr); ``refreshes``
    (step = steps done, interval to the next, share isolated of all elements, jaccard with the mask before, entered and released elements,
    share by layer)."""

    def __init__(self, stage: Stage, data: Probes, options: CurveOptions) -> None:
        self._every = options.every or max(1, stage.steps // POINTS)
        self._points: list[dict[str, Any]] = []
        self._refreshes: list[dict[str, Any]] = []
        self._watch = RefreshWatch()

    def before_step(self, stage: Stage, step: int) -> None:
        if step == 0:  # carried importance is isolated before the first step
            self._look(stage, 0)
        if step % self._every == 0 or step == stage.steps - 1:
            lr = float(stage.optimizer.param_groups[0]["lr"])
            # As they are: to read them now would make every step wait for the device.
            point = {"step": step, "loss": stage.loss, "grad_norm": stage.grad_norm, "lr": lr}
            self._points.append(point)

    def after_step(self, stage: Stage, step: int) -> None:
        self._look(stage, step + 1)

    def _look(self, stage: Stage, done: int) -> None:
        report = self._watch.new(stage, done)
        if report is None:
            return
        elements = sum(layer.elements for layer in report.layers)
        self._refreshes.append(
            {
                "step": done,
                "interval": report.interval,
                "share": report.isolated / elements if elements else 0.0,
                "jaccard": report.jaccard,
                "entered": report.entered,
                "released": report.released,
                "layers": {layer.name: layer.isolated / layer.elements for layer in report.layers},
            }
        )

    def record(self) -> dict[str, Any]:
        return {"every": self._every, "points": self._read(), "refreshes": self._refreshes}

    def _read(self) -> list[dict[str, float]]:
        return [
            {name: value if name == "step" else float(value) for name, value in point.items()}
            for point in self._points
        ]

    def state_dict(self) -> dict[str, Any]:
        return {
            "points": self._read(),
            "refreshes": list(self._refreshes),
            "watch": self._watch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._points, self._refreshes = list(state["points"]), list(state["refreshes"])
        self._watch.load_state_dict(state["watch"])
