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
