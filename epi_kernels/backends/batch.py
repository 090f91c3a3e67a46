"""What one backend steps together: parameters, and what is worth keeping of them from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from epi_kernels.backends.cuts import Cut
from epi_kernels.backends.table import PointerTable, fill_grads, step_table
from epi_kernels.reference.rounding import stream_key
from epi_kernels.reference.scalars import HyperParameters, StepScalars, step_scalars
from epi_kernels.reference.tensors import ParamTensors

LOW_PRECISION = (torch.bfloat16, torch.uint8)


class StepCounts:
    """The ``step`` tensors of a batch, on the host.

    Where they are views of one buffer, 300 of them are read and written in microseconds; else in a millisecond.
    """

    def __init__(self, steps: Sequence[Tensor], rows: np.ndarray | None = None) -> None:
        """``rows``: [n] the place in ``steps`` of each row that is asked for; None: a row a step."""
        self._steps = list(steps)
        self._rows = slice(None) if rows is None else rows
        self._shared: np.ndarray | None = None
        if share_storage(steps):
            whole = torch.empty(0, dtype=torch.float32, device="cpu").set_(steps[0].untyped_storage())
            self._shared = whole.numpy()
            self._index = np.array([step.storage_offset() for step in steps])

    def next(self) -> np.ndarray:
        """[n] int64: the number of the step at hand, counted from 1."""
        if self._shared is not None:
            return self._shared[self._index[self._rows]].astype(np.int64) + 1
        return np.array([int(step) for step in self._steps], dtype=np.int64)[self._rows] + 1

    def advance(self) -> None:
        if self._shared is not None:
            self._shared[self._index] += 1
        elif self._steps:
            torch._foreach_add_(self._steps, 1.0)  # pyright: ignore[reportPrivateImportUsage]


def share_storage(steps: Sequence[Tensor]) -> bool:
    """Whether float32 host tensors are views of one buffer."""
    return (
        len(steps) > 0
        and all(step.dtype == torch.float32 and step.device.type == "cpu" for step in steps)
        and len({step.untyped_storage().data_ptr() for step in steps}) == 1
    )


class StepBatch:
    """Parameters with gradients, stepped by one backend on one device.

    A row is a parameter, or a run of one whose state leaves elements out: ``tensors`` has one for every row, and whatever
    is asked for here is of rows; ``items`` and ``grads`` are of parameters.

    It may be kept while every tensor but the gradients stays where it is: give it the new ``grads`` then; ``hyper``
    and ``layer`` of ``tensors`` are read anew at every step. Neighbours that share one ``HyperParameters`` object
    must go on sharing one.
    """

    def __init__(self, tensors: Sequence[ParamTensors]) -> None:
        self.items = list(tensors)
        self.cut = Cut(self.items) if any(item.runs is not None for item in self.items) else None
        self.tensors = (
            self.items if self.cut is None else [self.items[item] for item in self.cut.index.tolist()]
        )
        self.grads: Sequence[Tensor] = [item.grad for item in self.items if item.grad is not None]
        steps = [item.step for item in self.items if item.step is not None]
        self.counts = StepCounts(steps, None if self.cut is None else self.cut.index)
        self.rng_ids = np.array([item.rng_id for item in self.tensors], dtype=np.int64)
        # tensors[start:stop] share their hyper-parameters
        self.runs: list[tuple[int, int]] = []
        for _, run in groupby(range(len(self.tensors)), key=lambda i: id(self.tensors[i].hyper)):
            rows = list(run)
            self.runs.append((rows[0], rows[-1] + 1))
        self.capturable = False  # what lies on the device may be kept for a CUDA graph
        self.host_rows: bytes | None = None
        self.device_rows: Tensor | None = None
        self.device_tables: tuple = ()  # all that the kernels of the last step read and write beside the tensors
        self.any_low_precision = any(_is_low_precision(item) for item in self.items)
        self._table: PointerTable | None = None

    def table(self, *, writes_grad: bool) -> PointerTable:
        """The rows of this step; of a kept batch only the gradients' addresses are filled in anew."""
        if self._table is None:
            self._table = step_table(self.items)
        assert len(self.grads) == len(self.items), "a parameter without a gradient has no step"
        fill_grads(self._table, self.grads, writes_grad=writes_grad)
        if self.cut is None:
            return self._table
        rows = self.cut.rows(self._table.rows)
        self.cut.count_apart(rows)
        return replace(self._table, rows=rows)

    def hypers(self) -> list[HyperParameters]:
        """One a run."""
        hypers = [self.tensors[start].hyper for start, _ in self.runs]
        return [hyper for hyper in hypers if hyper is not None]

    def scalars(self, t: np.ndarray) -> np.ndarray:
        """[n, 9] fp32: every row's ``StepScalars`` at its step."""
        result = np.empty((len(self.tensors), len(StepScalars._fields)), dtype=np.float32)
        for (start, stop), hyper in zip(self.runs, self.hypers(), strict=True):
            rows, steps = result[start:stop], t[start:stop]
            if (steps == steps[0]).all():
                rows[:] = step_scalars(int(steps[0]), hyper)
                continue
            for step in np.unique(steps).tolist():
                rows[steps == step] = step_scalars(step, hyper)
        return result

    def constants(self) -> tuple[np.ndarray, np.ndarray]:
        """What does not depend on the step's number, for a device that counts: [n, 9] fp32 ``StepScalars`` (eps and
        step_size are not theirs yet) and [n, 4] fp64 lr, beta1, beta2, eps."""
        scalars = np.empty((len(self.tensors), len(StepScalars._fields)), dtype=np.float32)
        hyper = np.empty((len(self.tensors), 4), dtype=np.float64)
        for (start, stop), values in zip(self.runs, self.hypers(), strict=True):
            scalars[start:stop] = step_scalars(1, values)
            hyper[start:stop] = (values.lr, values.beta1, values.beta2, values.eps)
        return scalars, hyper

    def rng_keys(self, seed: int, t: np.ndarray) -> np.ndarray:
        """[n] int64: the rows' ``stream_key``."""
        return stream_key(
            seed, t[:1] if (t == t[0]).all() else t, self.rng_ids
        )  # mixed once where they agree


def _is_low_precision(item: ParamTensors) -> bool:
    importance = item.importance
    return (
        item.param.dtype in LOW_PRECISION
        or item.exp_avg.dtype in LOW_PRECISION
        or (importance is not None and importance.dtype in LOW_PRECISION)
    )
