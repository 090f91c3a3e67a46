"""What ``torch.compile`` leaves to Python: kernels that read and write through tables of addresses, which no compiler sees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Method = TypeVar("Method", bound=Callable)


def uncompiled(method: Method) -> Method:
    """As ``torch.compiler.disable``, but the compiler is imported (a second or two) with the first call, not with us."""

    @functools.wraps(method)
    def wrapper(*args, **kwargs):
        disabled = getattr(method, "_uncompiled", None)
        if disabled is None:
            disabled = torch.compiler.disable(method)
            method._uncompiled = disabled  # type: ignore[attr-defined]
        return disabled(*args, **kwargs)

    return wrapper  # type: ignore[return-value]
