"""What the ranks hear where they meet: another's refusal, or that one has not come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def raise_first(heard: Sequence[str | None], own: Exception | None) -> None:
    """``heard``: each rank's words where it refuses. A rank's own error keeps its kind."""
    if own is not None:
        raise own
    for rank, text in enumerate(heard):
        if text is not None:
            raise ValueError(f"rank {rank}: {text}")


def check_steps(steps: Sequence[int], here: int) -> None:
    """``steps``: of the ranks; ``here``: of this one.

    Raises:
        ValueError: they are not the same.
    """
    if min(steps) != max(steps):
        raise ValueError(
            f"the ranks are at different steps, {min(steps)} to {max(steps)} (this one at {here}): load the same checkpoint "
            "on all of them, and call step() and refresh_isolation_mask() on all of them"
        )


@contextmanager
def meeting(step: int) -> Iterator[None]:
    """
    Raises:
        RuntimeError: the ranks have not met, as a backend that times out or loses a rank finds.
    """
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"the ranks did not meet after {step} steps: one has ended, or has refused a step that this one took (what it "
            "raised says why). End all of them and go on from the last checkpoint"
        ) from error
