"""A ring of host memory that gradients and weights pass through: bounded, and made once."""

from __future__ import annotations

import threading
from collections import deque
from typing import NamedTuple

from torch import Tensor

ALIGNMENT = 64  # bytes: whole cache lines, and the widest vectors


def aligned(n_bytes: int) -> int:
    """What a loan of so many bytes takes: one line at least, so that no two loans begin at one place."""
    return max(1, -(-n_bytes // ALIGNMENT)) * ALIGNMENT


class _Loan(NamedTuple):
    start: int
    stop: int


class Staging:
    """Lends parts of ``memory`` (uint8 [n]), which come back in the order they went. One thread lends, any gives back."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._loans: deque[_Loan] = deque()
        self._returned = threading.Condition()

    @property
    def n_bytes(self) -> int:
        return self._memory.numel()

    def lend(self, n_bytes: int) -> Tensor:
        """uint8 [aligned(n_bytes)]; waits until there is room."""
        size = aligned(n_bytes)
        assert size <= self.n_bytes, "made for the largest parameter"
        with self._returned:
            while (start := self._room(size)) is None:
                self._returned.wait()
            self._loans.append(_Loan(start, start + size))
        return self._memory[start : start + size]

    def give_back(self) -> None:
        """The oldest loan."""
        with self._returned:
            self._loans.popleft()
            self._returned.notify()

    def _room(self, size: int) -> int | None:
        """Where ``size`` bytes in a row are free."""
        if not self._loans:
            return 0
        oldest, newest = self._loans[0], self._loans[-1]
        if newest.start < oldest.start:  # the ring has come round
            return newest.stop if size <= oldest.start - newest.stop else None
        if size <= self.n_bytes - newest.stop:
            return newest.stop
        return 0 if size <= oldest.start else None
