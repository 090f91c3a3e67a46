"""Steps that are none of a training run.

``torch.distributed.checkpoint`` makes the state of a fresh optimizer by a step with lr 0 and gradients 0; the state must
come out as if it had not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from epi_kernels.distributed.world import World
from epi_kernels.optim.schedules import STEP_KEY

if TYPE_CHECKING:
    from epi_kernels.optim.masked_ema_adamw import MaskedEMAAdamW


def may_be_template(optimizer: MaskedEMAAdamW) -> bool:
    """Whether no step was taken, nothing loaded, and lr 0 was put into all groups since they were made."""
    groups = optimizer.param_groups
    fresh = groups[0][STEP_KEY] == 0 and not any(optimizer.state.values())
    return fresh and not optimizer._given_lr_0 and all(float(group["lr"]) == 0 for group in groups)


def moves_nothing(grads: Sequence[Tensor | None], world: World | None, device: torch.device) -> bool:
    """Whether all gradients are 0, on all ranks: a call of all of them."""
    moves = any(bool(grad.any()) for grad in grads if grad is not None)
    return not (moves if world is None else world.any(moves, device))
