"""A step's table of pointers, with a row for each run of elements that have state (``reference/runs.py``), not for each
parameter.

Kernels and their launchers know nothing of it: a run's row points into the weight, the gradient and the state where the
run begins in them. It costs the host a copy of the table, and nothing where no parameter has runs. The stages after the
step need no cut: what they read of a parameter lies end to end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from epi_kernels.backends import table
from epi_kernels.reference.runs import BLOCK, places
from epi_kernels.reference.tensors import ParamTensors

_EMPTY = np.zeros((1, 2), dtype=np.int64)  # of a parameter without any run: its ``step`` goes on


class Cut:
    """Of parameters of which some have runs."""

    def __init__(self, items: Sequence[ParamTensors]) -> None:
        self._items = items
        runs = [_whole(one) if one.runs is None else one.runs if len(one.runs) else _EMPTY for one in items]
        self.index = np.repeat(
            np.arange(len(items)), [len(one) for one in runs]
        )  # [rows]: each one's parameter
        self.first = np.flatnonzero(
            np.diff(self.index, prepend=-1)
        )  # [parameters]: the row that is theirs alone
        self._numel = np.concatenate([one[:, 1] for one in runs])
        self._offsets = np.concatenate([_offsets(item, one) for item, one in zip(items, runs, strict=True)])
        self._further = np.flatnonzero(np.diff(self.index, prepend=-1) == 0)
        self._owners, place = np.unique(self.index[self._further], return_inverse=True)
        device = items[0].param.device if items[0].step is None else items[0].step.device
        self._place = torch.from_numpy(place.astype(np.int64)).to(
            device
        )  # of further rows, among their owners
        self._copies = torch.empty(len(place), dtype=torch.float32, device=device)
        self._addresses = self._copies.data_ptr() + self._copies.element_size() * np.arange(len(place))

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """[parameters, COLUMNS] int64 -> [rows, COLUMNS]"""
        cut = rows[self.index]
        cut += self._offsets
        cut[:, table.NUMEL] = self._numel
        return cut

    def count_apart(self, rows: np.ndarray) -> None:
        """A device that counts adds one to every row's ``step``: all but a parameter's first get copies."""
        steps = [step for owner in self._owners.tolist() if (step := self._items[owner].step) is not None]
        if steps:
            torch.index_select(torch.stack(steps), 0, self._place, out=self._copies)
            rows[self._further, table.STEP] = self._addresses


def _whole(item: ParamTensors) -> np.ndarray:
    return np.array([[0, item.param.numel()]], dtype=np.int64)


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
