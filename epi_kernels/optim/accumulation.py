"""How many backwards a gradient has been accumulated over, as its hooks see it."""

from __future__ import annotations

import weakref
from typing import NamedTuple

from torch import Tensor

from epi_kernels.distributed.shards import is_sharded, local


class _Accumulated(NamedTuple):
    """What a parameter's ``.grad`` was when it was last added to."""

    grad: weakref.ref[Tensor]
    version: int
    local_version: int  # of a DTensor's part
    backwards: int

    @staticmethod
    def now(grad: Tensor, backwards: int) -> _Accumulated:
        return _Accumulated(weakref.ref(grad), grad._version, local(grad)._version, backwards)

    def written_since(self, grad: Tensor) -> bool:
        """Whether somebody has, besides one backward, as zero_grad(set_to_none=False) does. FSDP2 adds to a DTensor's
        part, of which the DTensor knows nothing; autograd and everybody else to the DTensor."""
        by_fsdp = is_sharded(grad) and local(grad)._version > self.local_version
        return grad._version != self.version + (0 if by_fsdp else 1)


class Backwards:
    """Counts each parameter by itself: one that takes no part in some backwards has fewer."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._last: dict[Tensor, _Accumulated] = {}

    def forget(self) -> None:
        self._last.clear()

    def completes(self, param: Tensor, grad: Tensor) -> bool:
        """Counts one more backward of ``param``, whose ``.grad`` now is ``grad``; whether it is the last."""
        if self._wanted == 1:
            return True
        before, backwards = self._last.pop(param, None), 1
        if before is not None and before.grad() is grad and not before.written_since(grad):
            backwards = before.backwards + 1
        if backwards >= self._wanted:
            return True
        self._last[param] = _Accumulated.now(grad, backwards)
        return False
