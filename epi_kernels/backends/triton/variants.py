"""What a kernel is specialised on, decided tensor by tensor from the rows of ``backends/table.py``."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from epi_kernels.backends import table as _table
from epi_kernels.backends.triton import step as _step
from epi_kernels.backends.triton.chunks import aligned_tensors
from epi_kernels.backends.triton.common import BFLOAT16, FLOAT32, INT4, INT8, ITEM_BYTES, THREADS
from epi_kernels.backends.triton.master import NO_CORRECTION, ONE_BYTE, TWO_BYTES
from epi_kernels.backends.triton.stats import WIDTH

# Rows of 8 elements a block: 8 elements a thread. With 16 the counting kernel spills.
REFRESH_ROWS = THREADS


class StepVariant(NamedTuple):
    """What the step kernel is specialised on, tensor by tensor. Kinds: common.FLOAT32 and so on."""

    param: int
    state: int
    importance: int  # step.SHARED, or step.OWN and its kind
    full: bool
    correction: int = NO_CORRECTION  # of bfloat16 weights: master.py
    scattered: bool = False  # a shard in several runs of neighbours (table.INDEX_RUN)

    @property
    def kinds(self) -> list[int]:
        own = [] if self.importance == _step.SHARED else [self.importance - _step.OWN]
        return [self.param, self.state, *own]

    @property
    def any_rounded(self) -> bool:
        return any(kind != FLOAT32 for kind in self.kinds)

    @property
    def width(self) -> int:
        """Elements of a row. Of single bytes, 16 make the 128 bits that a thread reads at once; of nibbles as many."""
        return 16 if not {INT8, INT4}.isdisjoint(self.kinds) or self.correction == ONE_BYTE else 8

    @property
    def rows(self) -> int:
        """Rows of a block: one access of 128 bits to the narrowest type is a thread's share, of 4-bit codes of 64.

        In bounds, 4-bit states of so many spill.
        """
        spills = self.state == INT4 and not self.full
        return THREADS if self.any_rounded and not spills else THREADS // 2

    @property
    def block(self) -> int:
        return self.rows * self.width


class RefreshVariant(NamedTuple):
    """What the kernels that read u are specialised on."""

    kind: int
    full: bool

    @property
    def block(self) -> int:
        return REFRESH_ROWS * WIDTH


def _kinds(flags: np.ndarray, bf16: int, int8: int, int4: int = 0) -> np.ndarray:
    codes = np.where(flags & int4 != 0, INT4, INT8)
    return np.where(flags & (int8 | int4) != 0, codes, np.where(flags & bf16 != 0, BFLOAT16, FLOAT32))


def step_forms(rows: np.ndarray, chunk: int) -> np.ndarray:
    """[n, 6] int64: the fields of the ``StepVariant`` of every row of ``table.step_table``, for chunks of ``chunk`` elements."""
    flags = rows[:, _table.FLAGS]
    param = _kinds(flags, _table.PARAM_BF16, 0)
    state = _kinds(flags, _table.STATE_BF16, _table.STATE_INT8, _table.STATE_INT4)
    own = _kinds(flags, _table.IMPORTANCE_BF16, _table.IMPORTANCE_INT8)
    importance = np.where(rows[:, _table.IMPORTANCE] != 0, _step.OWN + own, _step.SHARED)
    stored = np.where(flags & _table.CORRECTION_INT8 != 0, ONE_BYTE, TWO_BYTES)
    correction = np.where(rows[:, _table.WEIGHT_CORRECTION] != 0, stored, NO_CORRECTION)
    item_bytes = np.array(ITEM_BYTES)[np.stack([param, param, state, state, own, stored], axis=1)]
    columns = [_table.PARAM, _table.GRAD, _table.EXP_AVG, _table.EXP_AVG_SQ, _table.IMPORTANCE]
    aligned = aligned_tensors(rows[:, [*columns, _table.WEIGHT_CORRECTION]], item_bytes, chunk)
    return np.stack([param, state, importance, aligned, correction, rows[:, _table.INDEX_RUN] != 0], axis=1)


def step_variants(forms: np.ndarray) -> list[StepVariant]:
    """One a row of ``step_forms``. Hundreds take longer to make and to compare than all else that a step does for them."""
    return [
        StepVariant(param, state, importance, bool(full), correction, bool(scattered))
        for param, state, importance, full, correction, scattered in forms.tolist()
    ]


def u_kinds(flags: np.ndarray) -> np.ndarray:
    """[n]: how each importance is stored."""
    return _kinds(flags, _table.U_BF16, _table.U_INT8, _table.U_INT4)


def refresh_forms(u: np.ndarray, kinds: np.ndarray, chunk: int) -> np.ndarray:
    """[n, 2] int64: the fields of the ``RefreshVariant`` of every importance: its address and how it is stored, [n] each."""
    aligned = aligned_tensors(u[:, None], np.array(ITEM_BYTES)[kinds][:, None], chunk)
    return np.stack([kinds, aligned], axis=1)


def refresh_variants(forms: np.ndarray) -> list[RefreshVariant]:
    """One a row of ``refresh_forms``."""
    return [RefreshVariant(kind, bool(full)) for kind, full in forms.tolist()]
