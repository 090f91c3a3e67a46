"""What is measured beside a training run, by observers that change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from epi_kernels.repro.stage import Batch, Stage


class Probes(Protocol):
    """Batches to measure on, apart from the order of training, which they never advance. On the stage's device.

    The same arguments give the same examples at any time, after a resume too; no random state is touched.
    """

    def batch(self, task: int | None, index: int, rows: int) -> Batch:
        """``rows`` of the stage's training examples: of ``stage.tasks[task]``, or of its mixture (None). It learns from
        them too: importance is of the training loss.

        For one ``task`` and ``rows``, two values of ``index`` (0, 1, ...) have no example in common. Raises ReproError
        when there are too few.
        """
        ...

    def validation(self, rows: int) -> Batch:
        """At most ``rows`` examples of the stage's tasks, in equal shares, of the split that is never trained on."""
        ...


class Observer(Protocol):
    """Called around every step. It must leave weights, gradients, random states and optimizer as they were."""

    def before_step(self, stage: Stage, step: int) -> None:
        """Gradients are there, clipped; the optimizer has not stepped. `step` counts from 0.

        ``stage.loss`` and ``stage.grad_norm`` (before clipping) are those of the step under way.
        """
        ...

    def after_step(self, stage: Stage, step: int) -> None: ...

    def record(self) -> Any:
        """Plain JSON for the manifest's series."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """For a run that is stopped and goes on later: torch.save-able, and loads with weights_only."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
