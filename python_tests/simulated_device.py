"""A device in the host's memory, as slow as a device may be: nothing is copied before somebody waits for it.

What a copy is to write is NaN until then, and what it reads is read then: a wait too few, a buffer lent out too early,
a gradient or a weight let go too early each show in the bits.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from epi_kernels.optim import home
from epi_kernels.optim.offload import links, pipeline

NAN_BYTE = 255  # float32, bfloat16 and float64 of these bytes are NaN


# a tensor that nobody holds is gone when it is read or written, and its memory somebody else's
_Held = Callable[[], "Tensor | None"]


class _Queue:
    """Copies of one direction. Waiting for one makes it and those before it."""

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._waiting: list[list[tuple[_Held, _Held]]] = []
        self._done = 0
        self.most_bytes = 0  # that waited at once

    def add(self, pairs: Iterable[tuple[_Held, Tensor]]) -> links.Wait:
        with self._lock:
            copies = []
            for source, target in pairs:
                plain(target).fill_(torch.nan)
                copies.append((source, weakref.ref(target)))
            self._waiting.append(copies)
            targets = [target() for copies in self._waiting for _, target in copies]
            waiting = sum(target.nbytes for target in targets if target is not None)
            self.most_bytes = max(self.most_bytes, waiting)
            number = self._done + len(self._waiting)
        return lambda: self._make(number)

    def _make(self, number: int) -> None:
        with self._lock, torch.no_grad():
            while self._done < number:
                for held in self._waiting.pop(0):
                    source, target = (one() for one in held)
                    if source is not None and target is not None:
                        plain(target).copy_(plain(source))
                self._done += 1


class SimulatedLink:
    """``links.Link``; counts what it was asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        lock = threading.RLock()
        self.out, self.back = _Queue(lock), _Queue(lock)
        self.fetched = self.put_back = 0

    def memory(self, n_bytes: int) -> Tensor:
        return torch.full((n_bytes,), NAN_BYTE, dtype=torch.uint8)

    def fetch(self, pairs: links.Pairs) -> links.Wait:
        self.fetched += 1
        return self.out.add((weakref.ref(source), target) for source, target in pairs)

    def put(self, pairs: links.Pairs) -> links.Wait:
        self.put_back += 1
        return self.back.add((lambda source=source: source, target) for source, target in pairs)


def plain(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Tensor)


@pytest.fixture
def simulated(monkeypatch) -> list[SimulatedLink]:
    """CPU parameters lie on simulated devices; the links that were made. The ring is as small as the largest allows."""
    made: list[SimulatedLink] = []

    def link_to(device: torch.device) -> SimulatedLink:
        made.append(SimulatedLink(device))
        return made[-1]

    monkeypatch.setattr(links, "link_to", link_to)
    monkeypatch.setattr(pipeline, "STAGING_BYTES", 0)
    return made


class OnDevice(torch.Tensor):
    """Says that it is on a GPU: whoever makes state beside it fails where there is none."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: torch.device("cuda", 0))  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]


@pytest.fixture
def pinned(monkeypatch) -> list[torch.Size]:
    """Shapes of what was asked for in pinned memory, which there is none of without a driver."""
    shapes: list[torch.Size] = []

    def zeros(shape, dtype, device, *, pinned=False):
        if pinned:
            shapes.append(torch.Size(shape))
        return torch.zeros(shape, dtype=dtype, device=device)

    monkeypatch.setattr(home, "zeros", zeros)
    return shapes
