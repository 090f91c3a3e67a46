"""The table of pointers that compiled backends read: one row a parameter, one op call a stage.

A list of 600 tensors costs an op call 240 us before it starts (two cores, torch 2.13); the same
addresses in one int64 array cost nothing. The price is that nobody else keeps the tensors alive:
hold the ``PointerTable`` and what it was made from until the work is done (on a GPU: until it is in
the stream), then call ``finish``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from epi_kernels.reference.scalars import StepScalars
from epi_kernels.reference.tensors import ParamTensors

# Columns of ``rows``. Pointers are addresses, 0 where there is no tensor.
(
    PARAM,  # step only
    GRAD,  # step only
    EXP_AVG,  # step only
    EXP_AVG_SQ,
    IMPORTANCE,  # 0: shared, u is exp_avg_sq
    ISOLATION_MASK,  # packed bytes, 0: nothing is isolated
    PERSISTENT_MASK,
    NUMEL,
    LAYER,  # row of the layer tables, -1: no stats
    RNG_KEY,  # uint32; step only. Where the device counts, its input: the parameter's rng_id
    INDEX_OFFSET,  # logical position of element 0; step only
    FLAGS,
    EXP_AVG_SCALE,  # of states that are codes, 0 otherwise; step only
    EXP_AVG_SQ_SCALE,
    IMPORTANCE_SCALE,
    STEP,  # the parameter's ``step``; step only, where the device counts
    WEIGHT_CORRECTION,  # 0: the weights have no bits beside them; step only
    INDEX_RUN,  # 0, or a shard's neighbours: element i is at INDEX_OFFSET + i // run * stride + i % run; step only
    INDEX_STRIDE,
) = range(19)
COLUMNS = 19

# Bits of FLAGS.
PARAM_BF16 = 1  # param and grad
STATE_BF16 = 2  # exp_avg and exp_avg_sq
IMPORTANCE_BF16 = 4  # the parameter's own importance; unset when shared
U_BF16 = 8  # u, whichever of the two it is
MAXIMIZE = 16
STATE_INT8 = 32  # exp_avg and exp_avg_sq are codes (reference/codec.py)
IMPORTANCE_INT8 = 64  # the parameter's own importance; unset when shared
U_INT8 = 128  # u, whichever of the two it is
# 256: the cuda backend's
SKIPPED = 512  # found_inf was not 0: the step leaves the row alone; set on the device
STATE_INT4 = 2048  # exp_avg and exp_avg_sq are packed codes (reference/nibbles.py)
U_INT4 = 8192  # then u is one of them
CORRECTION_INT8 = 1024  # the weights' corrections have 8 bits, not 16 (reference/master.py)

SCALAR_COLUMNS = len(StepScalars._fields)

_U_OF_STATE = U_BF16 // STATE_BF16  # what turns the state's flag into u's, where u is exp_avg_sq


@dataclass(slots=True)
class PointerTable:
    rows: np.ndarray  # [n, COLUMNS] int64
    _alive: list[Sequence[Tensor]]  # what the pointers point to
    _written: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (tensor, dense copy)
    _strided_rows: list[int] = field(default_factory=list)  # of parameters that are not row-major
    _strided_params: list[Tensor] = field(default_factory=list)

    def finish(self) -> None:
        """Carries dense work copies back into the tensors they stand for. Call it after the op."""
        for tensor, dense in self._written:
            tensor.detach().copy_(dense)
        self._written.clear()
        self._alive.clear()


def step_table(tensors: Sequence[ParamTensors]) -> PointerTable:
    """Rows of the step, but for what changes at every step: GRAD (and PARAM of a parameter that is not
    row-major), by ``fill_grads``; RNG_KEY; LAYER where stats are wanted."""
    params = [item.param for item in tensors]
    exp_avgs = [item.exp_avg for item in tensors]
    exp_avg_sqs = [item.exp_avg_sq for item in tensors]
    importances = [item.importance for item in tensors]

    rows = np.zeros((len(tensors), COLUMNS), dtype=np.int64)
    _fill(rows, PARAM, Tensor.data_ptr, params)
    _fill(rows, EXP_AVG, Tensor.data_ptr, exp_avgs)
    _fill(rows, EXP_AVG_SQ, Tensor.data_ptr, exp_avg_sqs)
    _fill_optional(rows, IMPORTANCE, importances)
    _fill_optional(rows, EXP_AVG_SCALE, [item.exp_avg_scale for item in tensors])
    _fill_optional(rows, STEP, [item.step for item in tensors])
    corrections = [item.weight_correction for item in tensors]
    _fill_optional(rows, WEIGHT_CORRECTION, corrections)
    _fill(rows, NUMEL, Tensor.numel, params)
    _fill(rows, RNG_KEY, attrgetter("rng_id"), tensors)
    rows[:, FLAGS] = _state_flags(tensors) | _flags(params, "param", PARAM_BF16)
    rows[:, FLAGS] |= np.fromiter((item.maximize * MAXIMIZE for item in tensors), np.int64, len(tensors))
    for row, correction in enumerate(corrections):
        if correction is not None and correction.dtype == torch.int8:
            rows[row, FLAGS] |= CORRECTION_INT8
    _fill_common(rows, tensors)
    strided = [row for row, param in enumerate(params) if not param.is_contiguous()]
    return PointerTable(rows, [], [], strided, [params[row] for row in strided])


def fill_grads(table: PointerTable, grads: Sequence[Tensor], *, writes_grad: bool) -> None:
    """The addresses of a step's gradients. ``writes_grad``: the unscaled gradient must reach ``grad``."""
    table._written.clear()
    if table._strided_params:
        params = _dense(table._strided_params, table._written)
        table.rows[table._strided_rows, PARAM] = [param.data_ptr() for param in params]
        table._alive.append(params)
    dense = _dense(grads, table._written if writes_grad else None)
    _fill(table.rows, GRAD, Tensor.data_ptr, dense)
    table._alive.append(dense)


def fill_layers(table: PointerTable, tensors: Sequence[ParamTensors]) -> None:
    _fill(table.rows, LAYER, attrgetter("layer"), tensors)


def refresh_table(tensors: Sequence[ParamTensors]) -> PointerTable:
    """Rows of stats, threshold and mask, which read u and the masks alone."""
    exp_avg_sqs = [item.exp_avg_sq for item in tensors]
    importances = [item.importance for item in tensors]
    rows = np.zeros((len(tensors), COLUMNS), dtype=np.int64)
    _fill(rows, EXP_AVG_SQ, Tensor.data_ptr, exp_avg_sqs)
    _fill_optional(rows, IMPORTANCE, importances)
    _fill(rows, NUMEL, attrgetter("n_stored"), tensors)
    rows[:, FLAGS] = _state_flags(tensors)
    others = _fill_common(rows, tensors)
    return PointerTable(rows, [exp_avg_sqs, _present(importances), others])


def _fill(rows: np.ndarray, column: int, value: Callable[..., int], items: Iterable) -> None:
    rows[:, column] = np.fromiter(map(value, items), np.int64, len(rows))


def _fill_optional(rows: np.ndarray, column: int, tensors: list[Tensor | None]) -> None:
    present = _present(tensors)
    if len(present) == len(tensors):
        _fill(rows, column, Tensor.data_ptr, present)
    elif present:
        rows[:, column] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _fill_common(rows: np.ndarray, tensors: Sequence[ParamTensors]) -> list[Tensor]:
    """Columns of every stage: u's scales, the masks, where the elements belong. Returns what they point to."""
    columns = {
        EXP_AVG_SQ_SCALE: [item.exp_avg_sq_scale for item in tensors],
        IMPORTANCE_SCALE: [item.importance_scale for item in tensors],
        ISOLATION_MASK: [item.isolation_mask for item in tensors],
        PERSISTENT_MASK: [item.persistent_mask for item in tensors],
    }
    for column, pointed in columns.items():
        _fill_optional(rows, column, pointed)
    _fill(rows, LAYER, attrgetter("layer"), tensors)
    _fill(rows, INDEX_OFFSET, attrgetter("index_offset"), tensors)
    if any(map(attrgetter("index_run"), tensors)):
        _fill(rows, INDEX_RUN, attrgetter("index_run"), tensors)
        _fill(rows, INDEX_STRIDE, attrgetter("index_stride"), tensors)
    return [tensor for pointed in columns.values() for tensor in _present(pointed)]


def _present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _dense(tensors: Sequence[Tensor], written: list[tuple[Tensor, Tensor]] | None) -> Sequence[Tensor]:
    """Row-major tensors with the same values; copies are entered in ``written``."""
    if all(map(Tensor.is_contiguous, tensors)):
        return tensors
    result = []
    for tensor in tensors:
        dense = tensor
        if not tensor.is_contiguous():
            dense = tensor.detach().contiguous()
            if written is not None:
                written.append((tensor, dense))
        result.append(dense)
    return result


def _flags(tensors: Sequence[Tensor], what: str, bf16: int, int8: int = 0) -> int | np.ndarray:
    """The flag of every tensor's dtype; one number when all agree, which is the common case."""
    flag_of = {torch.float32: 0, torch.bfloat16: bf16} | ({torch.uint8: int8} if int8 else {})
    dtypes = list(map(attrgetter("dtype"), tensors))
    distinct = set(dtypes)
    unknown = distinct - flag_of.keys()
    if unknown:
        raise TypeError(f"{what}: expected one of {', '.join(map(str, flag_of))}, got {unknown.pop()}")
    if len(distinct) <= 1:
        return flag_of[dtypes[0]] if dtypes else 0
    return np.array([flag_of[dtype] for dtype in dtypes], dtype=np.int64)


def _state_flags(tensors: Sequence[ParamTensors]) -> int | np.ndarray:
    exp_avg_sqs = [item.exp_avg_sq for item in tensors]
    importances = [item.importance for item in tensors]
    state = _flags(exp_avg_sqs, "exp_avg_sq", STATE_BF16, STATE_INT8)
    packed = [item.has_nibbles for item in tensors]
    if any(packed):
        state = np.where(packed, STATE_INT4, state)
    shared = state * _U_OF_STATE
    own = [importance is not None for importance in importances]
    if not any(own):
        return state | shared
    u = np.zeros(len(own), dtype=np.int64) + shared
    u[own] = _flags(_present(importances), "importance", IMPORTANCE_BF16 | U_BF16, IMPORTANCE_INT8 | U_INT8)
    return state | u
