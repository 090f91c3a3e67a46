"""How many of the steps so far a device skipped, unknown to the host until it asks."""

from __future__ import annotations

from torch import Tensor


class SkippedSteps:
    """Counts, where it lies, how often ``found_inf`` was not 0. Only ``read`` waits for the device."""

    def __init__(self) -> None:
        self.unread = 0  # steps since the last reading
        self._count: Tensor | None = None  # [] int64

    def note(self, found_inf: Tensor) -> None:
        skipped = found_inf.detach().reshape(()).ne(0).long()
        self._count = skipped if self._count is None else self._count + skipped
        self.unread += 1

    def read(self) -> int:
        """How many were skipped; starts anew."""
        count = 0 if self._count is None else int(self._count)
        self.unread, self._count = 0, None
        return count
