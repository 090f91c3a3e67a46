"""Whether tensors still lie where they lay, asked of hundreds of them before every step.

``data_ptr`` from Python costs 0.15 us a tensor; the C++ extension, which keeps hold of the tensors, asks 1,500 of
them in 10. It must not hold what ``torch.utils.swap_tensors`` may swap: that wants a tensor held by Python alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    """[n] int64"""
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


class Watch:
    """These tensors and their addresses; storage swapped in place (``tensor.data = ...``) is noticed."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._number: int | None = None
        try:
            from epi_kernels import _C  # noqa: F401, importing it registers the operators
        except ImportError:
            self._addresses = addresses(self._tensors)
            return
        self._number = torch.ops.epi_kernels.watch(self._tensors)
        weakref.finalize(self, torch.ops.epi_kernels.unwatch, self._number)

    def unmoved(self) -> bool:
        if self._number is None:
            return np.array_equal(addresses(self._tensors), self._addresses)
        return torch.ops.epi_kernels.unmoved(self._number)
