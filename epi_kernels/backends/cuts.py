"""A table's rows, one a parameter, cut into one a run of elements that have state (``reference/runs.py``).

Kernels know nothing of it: a run's row points into the weight, the gradient and the state where the run begins in them.
Cutting costs the host a copy of the table, and nothing where no parameter has runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from epi_kernels.backends import table
from epi_kernels.backends.table import PointerTable
from epi_kernels.reference.runs import BLOCK, places
from epi_kernels.reference.tensors import ParamTensors

_EMPTY = np.zeros((1, 2), dtype=np.int64)  # of a parameter without any run: its ``step`` goes on


class Cut:
    """Of these parameters, for any number of tables over them."""

    def __init__(self, tensors: Sequence[ParamTensors]) -> None:
        self._tensors = tensors
        self._index: np.ndarray | None = None  # [rows] int64: the parameter of every row
        if all(item.runs is None for item in tensors):
            return
        runs = [
            _whole(item) if item.runs is None else item.runs if len(item.runs) else _EMPTY for item in tensors
        ]
        self._index = np.repeat(np.arange(len(tensors)), [len(one) for one in runs])
        self._numel = np.concatenate([one[:, 1] for one in runs])
        self._offsets = np.concatenate([_offsets(item, one) for item, one in zip(tensors, runs, strict=True)])
        self._further = np.flatnonzero(
            np.diff(self._index, prepend=-1) == 0
        )  # rows after a parameter's first
        self._steps: tuple[Tensor, ...] = ()

    def spread(self, values: np.ndarray) -> np.ndarray:
        """[n, ...] of the parameters -> [rows, ...]."""
        return values if self._index is None else values[self._index]

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """[n, COLUMNS or more] int64 of the parameters -> [rows, ...]; what follows the columns goes along."""
        if self._index is None:
            return rows
        cut = rows[self._index]
        cut[:, : table.COLUMNS] += self._offsets
        cut[:, table.NUMEL] = self._numel
        return cut

    def count_apart(self, rows: np.ndarray) -> None:
        """Where the device counts: it adds one to every row's ``step``, so all but a parameter's first get copies."""
        if self._index is None or not len(self._further):
            return
        owners, place = np.unique(self._index[self._further], return_inverse=True)
        steps = torch.stack([_step(self._tensors[owner]) for owner in owners.tolist()])
        copies = steps[torch.from_numpy(place.astype(np.int64)).to(steps.device)]
        rows[self._further, table.STEP] = copies.data_ptr() + copies.element_size() * np.arange(len(place))
        self._steps = (copies,)  # until the next step is in the stream


def refresh_table(tensors: Sequence[ParamTensors], *, by_runs: bool = False) -> PointerTable:
    """``table.refresh_table``: what a refresh reads lies end to end. ``by_runs``: a row a run, as in a step, for sums of
    float64 (zscore) depend on it."""
    made = table.refresh_table(tensors)
    if by_runs:
        made.rows = Cut(tensors).rows(made.rows)
    return made


def _whole(item: ParamTensors) -> np.ndarray:
    return np.array([[0, item.param.numel()]], dtype=np.int64)


def _step(item: ParamTensors) -> Tensor:
    assert item.step is not None, "what is stepped counts"
    return item.step


def _offsets(item: ParamTensors, runs: np.ndarray) -> np.ndarray:
    """[r, COLUMNS] int64: what a run's row has more than its parameter's."""
    offsets = np.zeros((len(runs), table.COLUMNS), dtype=np.int64)
    start, at = runs[:, 0], places(runs)
    offsets[:, table.INDEX_OFFSET] = start
    for column, tensor in (
        (table.PARAM, item.param),
        (table.GRAD, item.param),  # of its dtype
        (table.WEIGHT_CORRECTION, item.weight_correction),
    ):
        if tensor is not None:
            offsets[:, column] = start * tensor.element_size()
    for column, tensor in (
        (table.EXP_AVG, item.exp_avg),
        (table.EXP_AVG_SQ, item.exp_avg_sq),
        (table.IMPORTANCE, item.importance),
    ):
        if tensor is not None:
            offsets[:, column] = at * tensor.element_size()
    for column, tensor, elements in (
        (table.ISOLATION_MASK, item.isolation_mask, 8),
        (table.PERSISTENT_MASK, item.persistent_mask, 8),
        (table.EXP_AVG_SCALE, item.exp_avg_scale, BLOCK),
        (table.EXP_AVG_SQ_SCALE, item.exp_avg_sq_scale, BLOCK),
        (table.IMPORTANCE_SCALE, item.importance_scale, BLOCK),
    ):
        if tensor is not None:
            offsets[:, column] = at // elements
    return offsets
