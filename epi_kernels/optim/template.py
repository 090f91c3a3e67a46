"""Steps that are none of a training run.

``torch.distributed.checkpoint`` makes the state of a fresh optimizer by a step with lr 0 and gradients 0; the state must
come out as if it had not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from epi_kernels.distributed.world import World
from epi_kernels.optim.schedules import STEP_KEY


def is_fresh(param_groups: Sequence[Mapping[str, Any]], state_of: Mapping[Tensor, Mapping[str, Any]]) -> bool:
    """Whether no step was taken, and nothing loaded."""
    return param_groups[0][STEP_KEY] == 0 and not any(state_of.values())


def moves_nothing(
    param_groups: Sequence[Mapping[str, Any]],
    grads: Sequence[Tensor | None],
    world: World | None,
    device: torch.device,
) -> bool:
    """Whether lr and gradients are 0, on all ranks: a call of all of them."""
    if any(float(group["lr"]) != 0 for group in param_groups):
        return False
    moves = any(bool(grad.any()) for grad in grads if grad is not None)
    return not (moves if world is None else world.any(moves, device))
