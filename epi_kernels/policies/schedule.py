"""When a refresh is due."""

from __future__ import annotations


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
