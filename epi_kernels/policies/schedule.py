"""When a refresh is due, and how the mask interval and the isolation ratio may follow the drift of the masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from epi_kernels.policies.checks import check_interval, check_ratio, is_number, require

# of the step T alone: a resumed run asks anew
IntervalFunction = Callable[[int], int]
RatioFunction = Callable[[int], float]


def refresh_due(step: int, *, interval: int | None, warmup: int | None) -> bool:
    """Whether a refresh follows the ``step``-th call of ``step()``; ``warmup`` None means ``interval``."""
    if interval is None:
        return False
    warmup = interval if warmup is None else warmup
    return step >= max(warmup, 1) and (step - warmup) % interval == 0


def refresh_steps(total_steps: int, *, interval: int | None, warmup: int | None) -> list[int]:
    """The steps of a run of ``total_steps`` that a refresh follows."""
    return [step for step in range(1, total_steps + 1) if refresh_due(step, interval=interval, warmup=warmup)]


def may_be_due(first: int, last: int, *, interval: int | None, warmup: int | None) -> bool:
    """Whether a refresh is due after some step of ``first .. last``."""
    if interval is None:
        return False
    start = interval if warmup is None else warmup
    candidate = start if first <= start else first + (start - first) % interval
    return candidate <= last


def agreement(isolated: int, entered: int, released: int) -> float | None:
    """Jaccard overlap of two masks, over the largest that masks of their sizes can have (smaller / larger).

    For masks of one size it is the Jaccard overlap. A ratio that doubles halves the overlap of masks that agree:
    taken as drift, that would halve the ratio again. None where one mask is empty and says nothing.
    """
    before = isolated - entered + released
    smaller = min(isolated, before)
    if smaller == 0:
        return None
    return (isolated - entered) / (isolated + released) * (max(isolated, before) / smaller)


@dataclass(frozen=True)
class AdaptiveInterval:
    """H longer while successive masks agree, shorter when they drift: refreshes where there is something to refresh.

    After a refresh that was due, with the Jaccard overlap J of the new mask and the one before it:
    J >= ``high``: H becomes ceil(H * ``factor``); J < ``low``: floor(H / ``factor``); always within
    [``minimum``, ``maximum``]. The first mask has none before it and leaves H as it is. Reading J waits for a GPU,
    once a refresh.

    Args:
        initial: H up to the first mask that another follows, in steps.
        minimum: smallest H; None means a tenth of ``initial``, at least 1.
        maximum: largest H; None means ten times ``initial``.
        low, high: marks of J, 0 <= low <= high <= 1.
        factor: above 1.

    Raises:
        ValueError: a value is out of range; names it and what is allowed.
    """

    initial: int = 100
    minimum: int = None  # type: ignore[assignment]  # an int once made
    maximum: int = None  # type: ignore[assignment]
    low: float = 0.5
    high: float = 0.9
    factor: float = 2.0

    def __post_init__(self) -> None:
        _complete(self, check_interval, lambda initial: (max(1, initial // 10), 10 * initial))

    def within(self, interval: int) -> int:
        """The nearest that the bounds allow."""
        return min(max(interval, self.minimum), self.maximum)

    def following(self, interval: int, jaccard: float) -> int:
        """H after a refresh, from the H that led to it."""
        if jaccard >= self.high:
            interval = math.ceil(interval * self.factor)
        elif jaccard < self.low:
            interval = math.floor(interval / self.factor)
        return self.within(interval)


@dataclass(frozen=True)
class AdaptiveRatio:
    """p larger while successive masks agree, smaller when they drift: isolates what stays important, not what happened to be.

    As ``AdaptiveInterval``: J >= ``high``: p becomes p * ``factor``; J < ``low``: p / ``factor``; always within
    [``minimum``, ``maximum``]; it acts from the next refresh on. Masks of two ratios differ in size, so J is here the
    overlap over the largest that their sizes permit. Reading J waits for a GPU, once a refresh.

    Args:
        initial: p up to the first mask that another follows.
        minimum: smallest p, above 0; None means a tenth of ``initial``.
        maximum: largest p, below 1; None means ten times ``initial``, at most 0.5 (or ``initial``, where that is more).
        low, high: marks of J, 0 <= low <= high <= 1.
        factor: above 1.

    Raises:
        ValueError: a value is out of range; names it and what is allowed.
    """

    initial: float = 0.01
    minimum: float = None  # type: ignore[assignment]  # a float once made
    maximum: float = None  # type: ignore[assignment]
    low: float = 0.5
    high: float = 0.9
    factor: float = 2.0

    def __post_init__(self) -> None:
        _complete(
            self,
            _check_positive_ratio,
            lambda initial: (initial / 10, max(initial, min(10 * initial, 0.5))),
        )

    def within(self, ratio: float) -> float:
        """The nearest that the bounds allow."""
        return min(max(ratio, self.minimum), self.maximum)

    def following(self, ratio: float, jaccard: float) -> float:
        """p of the next refresh, from the p of this one."""
        if jaccard >= self.high:
            ratio = ratio * self.factor
        elif jaccard < self.low:
            ratio = ratio / self.factor
        return self.within(ratio)


def _check_positive_ratio(name: str, value: float) -> float:
    ratio = check_ratio(name, value)
    require(ratio > 0, name, ratio, "a number in (0, 1)")  # 0 could never grow
    return ratio


def _complete(
    adaptive: AdaptiveInterval | AdaptiveRatio,
    check: Callable[[str, float], float],
    bounds: Callable[[float], tuple[float, float]],  # of an initial value, where none are given
) -> None:
    """Bounds put in, all values checked."""

    def put(name: str, value: float) -> float:
        value = check(f"{type(adaptive).__name__}.{name}", value)
        object.__setattr__(adaptive, name, value)  # frozen, and not made yet
        return value

    initial = put("initial", adaptive.initial)
    for name, bound in zip(("minimum", "maximum"), bounds(initial)):
        given = getattr(adaptive, name)
        put(name, bound if given is None else given)
    _check_adaptive(adaptive)


def _check_adaptive(adaptive: AdaptiveInterval | AdaptiveRatio) -> None:
    name = type(adaptive).__name__
    for mark in ("low", "high"):
        value = getattr(adaptive, mark)
        require(is_number(value) and 0 <= value <= 1, f"{name}.{mark}", value, "a number in [0, 1]")
    require(adaptive.low <= adaptive.high, f"{name}.low", adaptive.low, f"at most high ({adaptive.high!r})")
    factor = adaptive.factor
    require(
        is_number(factor) and 1 < factor and math.isfinite(factor),
        f"{name}.factor",
        factor,
        "a number above 1",
    )
    bounds = f"within minimum and maximum ({adaptive.minimum!r} to {adaptive.maximum!r})"
    inside = adaptive.minimum <= adaptive.initial <= adaptive.maximum
    require(inside, f"{name}.initial", adaptive.initial, bounds)


RatioSchedule = RatioFunction | AdaptiveRatio
IntervalSchedule = IntervalFunction | AdaptiveInterval
