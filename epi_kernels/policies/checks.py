"""Checks of one value each: the message names the argument, the value and what is allowed."""

from __future__ import annotations

import numbers
from typing import Any


def require(ok: bool, name: str, value: Any, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)  # numpy's scalars too


def is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_ratio(name: str, value: Any, allowed: str = "a number in [0, 1)") -> float:
    """An isolation ratio."""
    require(is_number(value) and 0.0 <= value < 1.0, name, value, allowed)
    return float(value)


def check_interval(name: str, value: Any, allowed: str = "an int >= 1") -> int:
    """Steps between two refreshes."""
    require(is_int(value) and value >= 1, name, value, allowed)
    return int(value)
