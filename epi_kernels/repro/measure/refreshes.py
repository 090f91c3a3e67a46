"""Refreshes of the mask as an observer sees them: each once, also after a resume."""

from __future__ import annotations

from typing import Any

from epi_kernels.repro.stage import Stage


class RefreshWatch:
    """Follows ``optimizer.isolation_report()``; optimizers without it never refresh.

    Attributes:
        last: steps of this stage that were done when the last refresh was seen, -1 before the first.
        interval: steps to the next one, as far as is known; None where masks are never refreshed by themselves.
    """

    def __init__(self) -> None:
        self.last, self.interval = -1, None
        # T of that refresh: of the optimizer, which may have had steps before this stage
        self._known = -1

    def new(self, stage: Stage, done: int) -> Any | None:
        """The report of a refresh that was not seen yet; ``done``: steps of this stage."""
        report_of = getattr(stage.optimizer, "isolation_report", None)
        report = None if report_of is None else report_of()
        if report is None or report.step <= self._known:
            return None
        self._known, self.last, self.interval = report.step, done, report.interval
        return report

    def next_due(self, stage: Stage) -> int | None:
        """After which step of this stage the next refresh comes by plan; the first one after an interval."""
        if not hasattr(stage.optimizer, "isolation_report"):
            return None
        if self.last < 0:
            return getattr(stage.method.config, "interval", None)
        return None if self.interval is None else self.last + self.interval

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last, "interval": self.interval, "known": self._known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last, self.interval, self._known = state["last"], state["interval"], state["known"]
