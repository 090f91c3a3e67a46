"""Time and memory of a stage: milliseconds of its steps, bytes of what it holds, the peak."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epi_kernels.finetune.train import peak_memory_bytes
from epi_kernels.repro.manifest import Bytes, StepTime
from epi_kernels.repro.stage import Stage
from epi_kernels.training import state_bytes

SKIPPED = 3  # first steps of a process: state is made, kernels are compiled


class StepTimer:
    """Wrap what makes the gradient in ``gradient()`` and the update in ``update()``, once a step, observers outside.

    On a GPU by events, which are read once they are over: nothing waits. Else by the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._ms: dict[str, list[float]] = {"gradient": [], "update": []}
        self._pending: deque[tuple[str, Any, Any]] = deque()  # on a GPU, in order
        self._seen = {"gradient": 0, "update": 0}  # of this process

    def gradient(self) -> contextlib.AbstractContextManager[None]:
        """Forward, backward, clipping."""
        return self._timed("gradient")

    def update(self) -> contextlib.AbstractContextManager[None]:
        """The optimizer's step."""
        return self._timed("update")

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begin = self._mark()
        yield
        self._seen[what] += 1
        if self._seen[what] > SKIPPED:
            self._pending.append((what, begin, self._mark()))
        self._collect(wait=False)

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _collect(self, *, wait: bool) -> None:
        while self._pending:
            what, begin, end = self._pending[0]
            if self._on_gpu and wait:
                end.synchronize()
            if self._on_gpu and not end.query():
                return
            self._pending.popleft()
            self._ms[what].append(begin.elapsed_time(end) if self._on_gpu else 1e3 * (end - begin))

    def result(self) -> StepTime | None:
        """None before SKIPPED + 1 steps. A training step is a gradient and its update."""
        self._collect(wait=True)
        update, gradient = np.array(self._ms["update"]), np.array(self._ms["gradient"])
        if not update.size or update.size != gradient.size:
            return None
        p20, p50, p80 = np.percentile(update, [20, 50, 80]).tolist()
        return StepTime(
            optimizer_p20=p20,
            optimizer_p50=p50,
            optimizer_p80=p80,
            training_p50=float(np.median(update + gradient)),
            steps=update.size,
        )

    def state_dict(self) -> dict[str, Any]:
        self._collect(wait=True)
        return {what: list(values) for what, values in self._ms.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._ms = {what: list(values) for what, values in state.items()}


class PeakMemory:
    """As a context manager: the most bytes held inside, or until `settle`. ``bytes`` and ``of`` are there during and after
    it.

    Attributes:
        of: "device": what torch's allocator held of the GPU. "process": resident memory, on Linux, its high-water mark
            reset on entry. "process since its start" where that cannot be reset: an upper bound.
        before: the same on entry; None where it is not known.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._floor = device, 0
        self._final: int | None = None
        self.of, self.before = "process since its start", None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            gc.collect()  # what a run before left in cycles may still be there
            torch.cuda.reset_peak_memory_stats(self._device)
            self.of, self.before = "device", torch.cuda.memory_allocated(self._device)
        else:
            _give_back()
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
                self.before = _high_water_mark()
                self.of = "process"
        return self

    def __exit__(self, *_) -> None:
        self.settle()

    def settle(self) -> None:
        """What comes after it does not count."""
        self._final = self.bytes

    @property
    def bytes(self) -> int:
        if self._final is not None:
            return self._final
        now = _high_water_mark() if self.of == "process" else peak_memory_bytes(str(self._device))
        return max(self._floor, now)

    def state_dict(self) -> dict[str, int | None]:
        return {"bytes": self.bytes, "before": self.before}

    def load_state_dict(self, state: dict[str, int | None] | int) -> None:
        """The peak of the part of the stage before it was stopped, in another process: what it added counts. A number is
        an earlier version's, of the whole process."""
        peak, before = (state, None) if isinstance(state, int) else (state["bytes"] or 0, state["before"])
        if before is not None and self.before is not None:
            peak += self.before - before
        self._floor = peak


def _give_back() -> None:
    """To the system, what glibc keeps of freed memory: a run that took it anew would seem to need none."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _high_water_mark() -> int:
    """Raises OSError where the system does not say."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])  # printed in kB
    raise OSError("no VmHWM in /proc/self/status")


def stage_bytes(stage: Stage, peak: PeakMemory | None = None) -> Bytes:
    """What the stage holds: the model's weights, the optimizer's state and what its method keeps beside it; of all ranks
    where each has a part, but for the peak. A call of all ranks."""
    weights = list(stage.model.parameters())
    kinds = state_bytes(stage.optimizer)
    if stage.sharded:
        kinds = dict(zip(kinds, map(int, stage.ranks.sums(list(kinds.values()))), strict=True))
    total = kinds.pop("total")
    for kind, size in stage.method.extra_bytes().items():
        kinds[kind] = kinds.get(kind, 0) + size
        total += size
    return Bytes(
        parameters=sum(weight.numel() for weight in weights),
        weights=sum(weight.nbytes for weight in weights),
        optimizer={**kinds, "total": total},
        peak=None if peak is None else peak.bytes,
        peak_of="process" if peak is None else peak.of,
        before=None if peak is None else peak.before,
    )


def most(stages: Sequence[Bytes]) -> Bytes | None:
    """Of stages in sequence: the state of the one that keeps most of it, the highest peak of all. None of none."""
    if not stages:
        return None
    largest = max(stages, key=lambda one: one.optimizer["total"])
    highest = max((one for one in stages if one.peak is not None), key=_added, default=None)
    if highest is None:
        return largest
    return largest.model_copy(update={name: getattr(highest, name) for name in ("peak", "peak_of", "before")})


def _added(one: Bytes) -> int:
    return (one.peak or 0) - (one.before or 0)


def mean_time(stages: Sequence[StepTime]) -> StepTime | None:
    """Of stages in sequence: each figure's mean over all their steps, a stage's own standing for each of its steps. None
    of none."""
    if not stages:
        return None
    steps = [one.steps for one in stages]
    figures = ("optimizer_p20", "optimizer_p50", "optimizer_p80", "training_p50")
    means = {
        name: float(np.average([getattr(one, name) for one in stages], weights=steps)) for name in figures
    }
    return StepTime(**means, steps=sum(steps))
