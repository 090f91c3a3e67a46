"""What a kernel is specialised on, decided tensor by tensor from the rows of ``backends/table.py``."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from epi_kernels.backends import table as _table
from epi_kernels.backends.triton import step as _step
from epi_kernels.backends.triton.chunks import aligned_tensors
from epi_kernels.backends.triton.common import THREADS

# Rows of 8 elements a block: 8 elements a thread. With 16 the counting kernel spills.
REFRESH_ROWS = THREADS


class StepVariant(NamedTuple):
    """What the step kernel is specialised on, tensor by tensor."""

    param_bf16: bool
    state_bf16: bool
    importance: int  # step.SHARED, OWN_FLOAT32, OWN_BFLOAT16
    full: bool

    @property
    def any_bf16(self) -> bool:
        return self.param_bf16 or self.state_bf16 or self.importance == _step.OWN_BFLOAT16

    @property
    def rows(self) -> int:
        """Rows of a block: one access of 128 bits to the narrowest type is a thread's share."""
        return THREADS if self.any_bf16 else THREADS // 2

    @property
    def block(self) -> int:
        return self.rows * 8


class RefreshVariant(NamedTuple):
    """What the kernels that read u are specialised on."""

    bf16: bool
    full: bool

    @property
    def block(self) -> int:
        return REFRESH_ROWS * 8


def step_variants(rows: np.ndarray, chunk: int) -> list[StepVariant]:
    """The variant of every row of ``table.step_table``, for chunks of ``chunk`` elements."""
    flags = rows[:, _table.FLAGS]
    param_bf16, state_bf16 = flags & _table.PARAM_BF16 != 0, flags & _table.STATE_BF16 != 0
    own, own_bf16 = rows[:, _table.IMPORTANCE] != 0, flags & _table.IMPORTANCE_BF16 != 0
    importance = np.where(own, np.where(own_bf16, _step.OWN_BFLOAT16, _step.OWN_FLOAT32), _step.SHARED)
    is_bf16 = np.stack([param_bf16, param_bf16, state_bf16, state_bf16, own_bf16], axis=1)
    columns = [_table.PARAM, _table.GRAD, _table.EXP_AVG, _table.EXP_AVG_SQ, _table.IMPORTANCE]
    aligned = aligned_tensors(rows[:, columns], np.where(is_bf16, 2, 4), chunk)
    columns = (param_bf16.tolist(), state_bf16.tolist(), importance.tolist(), aligned.tolist())
    return list(map(StepVariant, *columns))


def refresh_variants(u: np.ndarray, bf16: np.ndarray, chunk: int) -> list[RefreshVariant]:
    """The variant of every importance: its address and whether it is bfloat16, [n] each."""
    aligned = aligned_tensors(u[:, None], np.where(bf16, 2, 4)[:, None], chunk)
    return list(map(RefreshVariant, bf16.tolist(), aligned.tolist()))
