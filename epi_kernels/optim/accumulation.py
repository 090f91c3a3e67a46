"""How many backwards a gradient has been accumulated over, as its hooks see it."""

from __future__ import annotations

import weakref
from typing import NamedTuple

from torch import Tensor

from epi_kernels.distributed.shards import is_sharded


class _Accumulated(NamedTuple):
    """What a parameter's ``.grad`` was when it was last added to."""

    grad: weakref.ref[Tensor]
    version: int
    backwards: int


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
        if before is not None and before.grad() is grad:
            # somebody has written into it since, as zero_grad(set_to_none=False) does; a DTensor cannot tell
            if is_sharded(grad) or grad._version == before.version + 1:
                backwards = before.backwards + 1
        if backwards >= self._wanted:
            return True
        self._last[param] = _Accumulated(weakref.ref(grad), grad._version, backwards)
        return False
