"""Steps that are none of a training run.

``torch.distributed.checkpoint`` makes the state of a fresh optimizer by a step with lr 0 and gradients 0; the state must
come out as if it had not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from epi_kernels.optim.schedules import STEP_KEY

if TYPE_CHECKING:
    from epi_kernels.optim.masked_ema_adamw import MaskedEMAAdamW


def may_be_template(optimizer: MaskedEMAAdamW) -> bool:
    """Whether no step was taken, and lr 0 was put into all groups since they were made: the same on all ranks."""
    groups = optimizer.param_groups
    return (
        groups[0][STEP_KEY] == 0
        and not optimizer._given_lr_0
        and all(float(group["lr"]) == 0 for group in groups)
    )


def is_template(optimizer: MaskedEMAAdamW, grads: Sequence[Tensor | None]) -> bool:
    """Whether the step at hand is one, as far as this rank sees: nothing is there, and nothing moves."""
    if not may_be_template(optimizer) or any(optimizer.state.values()):
        return False
    return not any(bool(grad.any()) for grad in grads if grad is not None)
