"""Steps that a CUDA graph replays: T without the host, and what must hold before one is captured."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from epi_kernels.backends import capture
from epi_kernels.optim.plan import StepPlan
from epi_kernels.optim.skipped import SkippedSteps


class ReplayedSteps:
    """T, told by the ``step`` of a parameter that is stepped at every call: both advance together from here on.

    Made outside a capture: it waits for the device.
    """

    def __init__(self, step: Tensor, isolation_step: int) -> None:
        self._step = step  # [] fp32, where it is counted
        self._ahead = isolation_step - int(step)

    def isolation_step(self) -> int:
        """Waits for the device."""
        return int(self._step) + self._ahead


def steps_done(noted: int, skipped: SkippedSteps, replayed: ReplayedSteps | None) -> int:
    """T, where ``noted`` steps were called and a device may have skipped some or replayed others; waits for it then."""
    n_skipped = skipped.read() if skipped.unread else 0
    return noted - n_skipped if replayed is None else replayed.isolation_step()


class Captured:
    """What graphs go on using: their kernels write through addresses, and own nothing.

    Held as long as the optimizer is, for nobody says when a graph goes.
    """

    def __init__(self) -> None:
        self.graphs: list[tuple] = []

    def keep(self, plan: StepPlan, grads: Sequence[Tensor | None]) -> None:
        self.graphs.append((plan, plan.on_device(), list(grads)))


def is_captured(*, capturable: bool) -> bool:
    """Whether a step at hand is being captured.

    Raises:
        RuntimeError: it is, and the optimizer is not made for it.
    """
    captured = capture.capturing()
    if captured and not capturable:
        raise RuntimeError(
            "step() cannot be captured in a CUDA graph: make the optimizer with capturable=True"
        )
    return captured


def check_capture(plan: StepPlan | None, fits: bool) -> None:
    """
    Raises:
        RuntimeError: no step was taken before, or not on the memory that there is now. Nothing is captured then.
    """
    if plan is None or not fits:
        raise RuntimeError(
            "before a step is captured, take one with the same parameters and gradients: kernels are compiled and tables "
            "copied then. Keep the gradients' memory: zero_grad(set_to_none=False)"
        )
