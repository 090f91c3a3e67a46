"""Gradients and weights on their way to the host, through the step, and back: each parameter by itself, in order.

    the caller     room in the staging ring (waits for it) -> fetch gradient and weight
    step thread    wait for the fetch -> let the gradient go -> step -> put the weight
    return thread  wait for the put -> let the weight go -> give the room back

While one parameter is stepped the next are fetched and the last are put, and the backward pass goes on. The weights on
the device are the only ones: they are fetched anew at every step, so that whoever sets them is heard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from epi_kernels.optim.offload import links
from epi_kernels.optim.offload.staging import Staging, aligned

# Gradients wait on the device while the ring is full. 512 MiB hold weights and gradients of half a decoder layer of an
# 8-billion-parameter model in bfloat16: the step is slower than either copy, which then hide behind it.
STAGING_BYTES = 1 << 29

Compute = Callable[[Tensor, Tensor], None]  # steps (weight, gradient) in host memory


@dataclass
class _Job:
    """One parameter on its way. ``held``: what of the device must outlive the fetch; what ``put`` writes must outlive that."""

    fetched: links.Wait
    held: list[Tensor]
    compute: Callable[[], None]
    put: Callable[[], links.Wait]


class HostPipeline:
    """The way of one optimizer's parameters, whose ``weights`` are these at first."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        needs = [_room_for(weight) for weight in weights]
        self._wanted = max(max(needs, default=0), min(sum(needs), STAGING_BYTES))
        self._links: dict[torch.device, links.Link] = {}
        self._staging: Staging | None = None
        self._steps = ThreadPoolExecutor(1, "epi-offload-step")
        self._returns = ThreadPoolExecutor(1, "epi-offload-return")
        self._running: deque[Future[Future[None]]] = deque()
        self._failure: BaseException | None = None

    @property
    def staging_bytes(self) -> int:
        """At most ``STAGING_BYTES``, or what the largest parameter needs where that is more."""
        return 0 if self._staging is None else self._staging.n_bytes

    def submit(self, weight: Tensor, grad: Tensor, compute: Compute, *, writes_grad: bool) -> None:
        """Steps ``weight`` with ``grad``, soon: ``drain`` waits for it. ``writes_grad``: ``compute`` changes it.

        Raises:
            BaseException: what an earlier step since the last ``drain`` raised.
        """
        if self._failure is not None:
            self.drain()
        weight, grad = weight.detach(), grad.detach()
        link = self._link(weight.device)
        room = self._ring(link, _room_for(weight)).lend(_room_for(weight))
        half = room.numel() // 2
        host_weight, host_grad = (_laid_out(part, weight) for part in (room[:half], room[half:]))
        back = [(host_weight, weight), *([(host_grad, grad)] if writes_grad else [])]
        job = None
        try:
            fetched = link.fetch([(grad, host_grad), (weight, host_weight)])
            job = _Job(fetched, [grad], lambda: compute(host_weight, host_grad), lambda: link.put(back))
        finally:  # without a job the room is given back in its turn
            self._running.append(self._steps.submit(self._step, job))

    def drain(self) -> None:
        """Waits until every weight is back on its device.

        Raises:
            BaseException: what a step raised; those after it were not taken.
            KeyboardInterrupt: once every weight is back too; of a second one the next call waits for the rest.
        """
        try:
            self._wait()
        except KeyboardInterrupt:  # whoever goes on from it may set or save what is on its way
            self._wait()
            raise
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _wait(self) -> None:
        while self._running:
            self._running[0].result().result()
            self._running.popleft()

    # ---------------------------------------------------------------- the two threads

    @torch.no_grad()
    def _step(self, job: _Job | None) -> Future[None]:
        wait = None
        try:
            if job is not None:
                job.fetched()
                job.held.clear()
                if self._failure is None:
                    job.compute()
                    wait = job.put()
        except BaseException as error:  # for whoever drains
            self._failure = self._failure or error
        return self._returns.submit(self._return, wait, job)

    def _return(self, wait: links.Wait | None, _: _Job | None) -> None:
        """Holds the job, and with it what is written, while it waits: memory that is let go is somebody else's at once."""
        try:
            if wait is not None:
                wait()
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            assert self._staging is not None
            self._staging.give_back()

    # ---------------------------------------------------------------- what is made once

    def _link(self, device: torch.device) -> links.Link:
        if device not in self._links:
            self._links[device] = links.link_to(device)
            # memory that was asked for before, of the host's own link say, need not be pinned
            if device.type != "cpu":
                self.drain()
                self._staging = None
        return self._links[device]

    def _ring(self, link: links.Link, least: int) -> Staging:
        if self._staging is None or self._staging.n_bytes < least:
            self.drain()
            self._staging = Staging(link.memory(max(self._wanted, least)))
        return self._staging


def _room_for(weight: Tensor) -> int:
    """Bytes of the ring for a weight and its gradient."""
    return 2 * aligned(weight.numel() * weight.element_size())


def _laid_out(room: Tensor, like: Tensor) -> Tensor:
    """Row-major, of ``like``'s shape and dtype."""
    return room[: like.numel() * like.element_size()].view(like.dtype).view(like.shape)
