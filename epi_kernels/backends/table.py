"""The table of pointers that compiled backends read: one row a parameter, one op call a stage.

A list of 600 tensors costs an op call 240 us before it starts (two cores, torch 2.13); the same
addresses in one int64 array cost nothing. The price is that nobody else keeps the tensors alive:
hold the ``PointerTable`` until the work is done (on a GPU: until it is in the stream), then call
``finish``.
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
    RNG_KEY,  # uint32; step only
    INDEX_OFFSET,  # logical position of element 0; step only
    FLAGS,
    EXP_AVG_SCALE,  # of 8-bit states, 0 otherwise; step only
    EXP_AVG_SQ_SCALE,
    IMPORTANCE_SCALE,
    STEP,  # the parameter's ``step``; step only, where the device counts
) = range(16)
COLUMNS = 16

# Bits of FLAGS.
PARAM_BF16 = 1  # param and grad
STATE_BF16 = 2  # exp_avg and exp_avg_sq
IMPORTANCE_BF16 = 4  # the parameter's own importance; unset when shared
U_BF16 = 8  # u, whichever of the two it is
MAXIMIZE = 16
STATE_INT8 = 32  # exp_avg and exp_avg_sq are codes (reference/codec.py)
IMPORTANCE_INT8 = 64  # the parameter's own importance; unset when shared
U_INT8 = 128  # u, whichever of the two it is

SCALAR_COLUMNS = len(StepScalars._fields)

_U_OF_STATE = U_BF16 // STATE_BF16  # what turns the state's flag into u's, where u is exp_avg_sq


@dataclass(slots=True)
class PointerTable:
    rows: np.ndarray  # [n, COLUMNS] int64
    scalars: np.ndarray | None  # [n, SCALAR_COLUMNS] fp32; step only
    _alive: list[list[Tensor]]  # what the pointers point to
    _written: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (tensor, dense copy)

    def finish(self) -> None:
        """Carries dense work copies back into the tensors they stand for. Call it after the op."""
        for tensor, dense in self._written:
            tensor.detach().copy_(dense)
        self._written.clear()


def step_table(tensors: Sequence[ParamTensors], *, writes_grad: bool) -> PointerTable:
    """Rows of the step. ``writes_grad``: the unscaled gradient must reach ``grad``."""
    written: list[tuple[Tensor, Tensor]] = []
    params = _dense([item.param for item in tensors], written)
    grads = [item.grad for item in tensors if item.grad is not None]
    assert len(grads) == len(params), "a parameter without a gradient has no step"
    grads = _dense(grads, written if writes_grad else None)
    exp_avgs = [item.exp_avg for item in tensors]
    exp_avg_sqs = [item.exp_avg_sq for item in tensors]
    importances = [item.importance for item in tensors]

    rows = np.zeros((len(tensors), COLUMNS), dtype=np.int64)
    _fill(rows, PARAM, Tensor.data_ptr, params)
    _fill(rows, GRAD, Tensor.data_ptr, grads)
    _fill(rows, EXP_AVG, Tensor.data_ptr, exp_avgs)
    _fill(rows, EXP_AVG_SQ, Tensor.data_ptr, exp_avg_sqs)
    _fill_optional(rows, IMPORTANCE, importances)
    _fill_optional(rows, EXP_AVG_SCALE, [item.exp_avg_scale for item in tensors])
    _fill(rows, NUMEL, Tensor.numel, params)
    _fill(rows, RNG_KEY, attrgetter("rng_key"), tensors)
    rows[:, FLAGS] = _u_flags(exp_avg_sqs, importances) | _flags(params, "param", PARAM_BF16)
    if any(map(attrgetter("maximize"), tensors)):
        rows[:, FLAGS] |= [item.maximize * MAXIMIZE for item in tensors]
    masks = _fill_common(rows, tensors)
    alive = [params, grads, exp_avgs, exp_avg_sqs, _present(importances), masks]
    return PointerTable(rows, _scalars(tensors), alive, written)


def refresh_table(tensors: Sequence[ParamTensors]) -> PointerTable:
    """Rows of stats, threshold and mask, which read u and the masks alone."""
    exp_avg_sqs = [item.exp_avg_sq for item in tensors]
    importances = [item.importance for item in tensors]
    rows = np.zeros((len(tensors), COLUMNS), dtype=np.int64)
    _fill(rows, EXP_AVG_SQ, Tensor.data_ptr, exp_avg_sqs)
    _fill_optional(rows, IMPORTANCE, importances)
    _fill(rows, NUMEL, Tensor.numel, exp_avg_sqs)
    rows[:, FLAGS] = _u_flags(exp_avg_sqs, importances)
    masks = _fill_common(rows, tensors)
    return PointerTable(rows, None, [exp_avg_sqs, _present(importances), masks])


def _fill(rows: np.ndarray, column: int, value: Callable[..., int], items: Iterable) -> None:
    rows[:, column] = np.fromiter(map(value, items), np.int64, len(rows))


def _fill_optional(rows: np.ndarray, column: int, tensors: list[Tensor | None]) -> None:
    present = _present(tensors)
    if len(present) == len(tensors):
        _fill(rows, column, Tensor.data_ptr, present)
    elif present:
        rows[:, column] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _fill_common(rows: np.ndarray, tensors: Sequence[ParamTensors]) -> list[Tensor]:
    """Columns of every stage: u's scales, the masks, where the elements belong."""
    _fill_optional(rows, EXP_AVG_SQ_SCALE, [item.exp_avg_sq_scale for item in tensors])
    _fill_optional(rows, IMPORTANCE_SCALE, [item.importance_scale for item in tensors])
    isolation = [item.isolation_mask for item in tensors]
    persistent = [item.persistent_mask for item in tensors]
    _fill_optional(rows, ISOLATION_MASK, isolation)
    _fill_optional(rows, PERSISTENT_MASK, persistent)
    _fill(rows, LAYER, attrgetter("layer"), tensors)
    _fill(rows, INDEX_OFFSET, attrgetter("index_offset"), tensors)
    return _present(isolation) + _present(persistent)


def _present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _dense(tensors: list[Tensor], written: list[tuple[Tensor, Tensor]] | None) -> list[Tensor]:
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


def _u_flags(exp_avg_sqs: list[Tensor], importances: list[Tensor | None]) -> int | np.ndarray:
    state = _flags(exp_avg_sqs, "exp_avg_sq", STATE_BF16, STATE_INT8)
    shared = state * _U_OF_STATE
    own = [importance is not None for importance in importances]
    if not any(own):
        return state | shared
    u = np.zeros(len(own), dtype=np.int64) + shared
    u[own] = _flags(_present(importances), "importance", IMPORTANCE_BF16 | U_BF16, IMPORTANCE_INT8 | U_INT8)
    return state | u


def _scalars(tensors: Sequence[ParamTensors]) -> np.ndarray:
    """Parameters of one group share one StepScalars: convert each once."""
    all_scalars = [item.scalars for item in tensors]
    distinct: dict[int, StepScalars] = {}
    for scalars in all_scalars:
        assert scalars is not None
        distinct[id(scalars)] = scalars
    table = np.array(list(distinct.values()), dtype=np.float32).reshape(-1, SCALAR_COLUMNS)
    if len(distinct) <= 1:
        return table.repeat(len(tensors), axis=0) if distinct else table
    position = {key: row for row, key in enumerate(distinct)}
    return table[[position[id(scalars)] for scalars in all_scalars]]
