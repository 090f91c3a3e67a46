"""Time and memory of a stage: milliseconds of its steps, bytes of what it holds, the peak."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
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
    """As a context manager: the most bytes held inside. ``bytes`` and ``of`` are there during and after it.

    Attributes:
        of: "device": what torch's allocator held of the GPU. "process": resident memory, on Linux, its high-water mark
            reset on entry. "process since its start" where that cannot be reset: an upper bound.
        before: the same on entry; None where it is not known.
    """

    def __init__(self, device: torch.device, at_least: int = 0) -> None:
        """``at_least``: the peak of the part of the stage before it was stopped."""
        self._device, self._floor, self._final = device, at_least, None
        self.of, self.before = "process since its start", None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self.of, self.before = "device", torch.cuda.memory_allocated(self._device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
                self.before = _high_water_mark()
                self.of = "process"
        return self

    def __exit__(self, *_) -> None:
        self._final = self.bytes

    @property
    def bytes(self) -> int:
        if self._final is not None:
            return self._final
        now = _high_water_mark() if self.of == "process" else peak_memory_bytes(str(self._device))
        return max(self._floor, now)


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
    )
