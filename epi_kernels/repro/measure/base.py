"""What is measured beside a training run, by observers that change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from epi_kernels.repro.stage import Stage


class Observer(Protocol):
    """Called around every step. It must leave weights, gradients, random states and optimizer as they were."""

    def before_step(self, stage: Stage, step: int) -> None:
        """Gradients are there, clipped; the optimizer has not stepped. `step` counts from 0."""
        ...

    def after_step(self, stage: Stage, step: int) -> None: ...

    def record(self) -> Any:
        """Plain JSON for the manifest's series."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """For a run that is stopped and goes on later: torch.save-able."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
