"""Copies between a device and host memory, on two queues of their own, and how the host waits for one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

Wait = Callable[[], object]  # returns when the copies that were asked for together have ended
Pairs = Iterable[tuple[Tensor, Tensor]]  # (source, target)


class Link(Protocol):
    """The way to one device. Copies of one direction run in the order they were asked for.

    Source and target stay as they are, and alive, until the copy's ``Wait`` has returned.
    """

    def memory(self, n_bytes: int) -> Tensor:
        """uint8 [n_bytes] on the host, that the copies below are made for."""
        ...

    def fetch(self, pairs: Pairs) -> Wait:
        """Device to host, after what the current stream of the device has been told so far."""
        ...

    def put(self, pairs: Pairs) -> Wait:
        """Host to device, at once."""
        ...


class CudaLink:
    """Two streams beside the one that computes: both directions of the bus are used at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def memory(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)

    def fetch(self, pairs: Pairs) -> Wait:
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        return _copy_on(self._out, pairs)

    def put(self, pairs: Pairs) -> Wait:
        return _copy_on(self._in, pairs)


def _copy_on(stream: torch.cuda.Stream, pairs: Pairs) -> Wait:
    event = torch.cuda.Event(blocking=True)  # who waits sleeps: the cores are for the step
    with torch.cuda.stream(stream):
        for source, target in pairs:
            target.copy_(source, non_blocking=True)
        event.record(stream)
    return event.synchronize


class HostLink:
    """Of parameters that lie in host memory themselves: copies are made at once."""

    def memory(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, device="cpu")

    def fetch(self, pairs: Pairs) -> Wait:
        return self.put(pairs)

    def put(self, pairs: Pairs) -> Wait:
        for source, target in pairs:
            target.copy_(source)
        return _at_once


def _at_once() -> None:
    pass


def link_to(device: torch.device) -> Link:
    return CudaLink(device) if device.type == "cuda" else HostLink()
