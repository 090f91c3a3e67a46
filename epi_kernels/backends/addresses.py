"""Whether tensors still lie where and as they lay, asked of hundreds of them before every step.

Address, dtype, shape and strides: a freed address is soon given out again. Asked from Python that costs 0.5 us a
tensor; the C++ extension, which keeps hold of the tensors, asks 1,500 of them in some 20. It must not hold what
``torch.utils.swap_tensors`` may swap, weights above all: that wants a tensor held by Python alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from epi_kernels.backends.operators import cpu_operators


def addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    """[n] int64"""
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


class Watch:
    """Dense tensors as they lie in memory; what is changed in place (``tensor.data = ...``, ``resize_``) is noticed."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._number: int | None = None
        try:
            self._operators = cpu_operators()
        except ImportError:
            self._layouts = self._found()
            return
        self._number = self._operators.watch(self._tensors)
        weakref.finalize(self, self._operators.unwatch, self._number)

    def unmoved(self) -> bool:
        if self._number is None:
            return self._found() == self._layouts
        return self._operators.unmoved(self._number)

    def _found(self) -> list[tuple]:
        return [(one.data_ptr(), one.dtype, one.shape, one.stride()) for one in self._tensors]
