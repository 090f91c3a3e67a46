"""The optimizers that methods share, with a stage's recipe."""

from __future__ import annotations

from typing import Any

import torch

from epi_kernels.integrations.groups import named_parameter_groups
from epi_kernels.optim import MaskedEMAAdamW
from epi_kernels.repro.stage import Stage

STATE_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": "int8"}


def parameter_groups(stage: Stage) -> list[dict[str, Any]]:
    """(name, parameter) pairs of what trains; biases and norms have no weight decay."""
    return named_parameter_groups(stage.model, weight_decay=stage.recipe.weight_decay)


def adamw(stage: Stage) -> torch.optim.Optimizer:
    """torch.optim.AdamW; over bfloat16 weights the same update by MaskedEMAAdamW at ratio 0, with stochastic rounding.

    torch rounds to nearest: a step below half a unit in a weight's last place, 0.2 % of the weight, never moves it, and
    at the learning rates of large models most steps are.
    """
    if any(param.dtype == torch.bfloat16 for param in stage.model.parameters() if param.requires_grad):
        return masked_adamw(stage)
    return torch.optim.AdamW(
        parameter_groups(stage), lr=stage.recipe.lr, betas=stage.recipe.betas, fused=True
    )


def masked_adamw(stage: Stage, *, isolation_ratio: Any = 0.0, **options: Any) -> MaskedEMAAdamW:
    """Ratio 0, the default: no mask but those that are installed. States are of the recipe's dtype, unless `options`
    say otherwise."""
    options.setdefault("state_dtype", STATE_DTYPES[stage.recipe.state_dtype])
    return MaskedEMAAdamW(
        parameter_groups(stage),
        lr=stage.recipe.lr,
        betas=stage.recipe.betas,
        isolation_ratio=isolation_ratio,
        seed=stage.seed,
        **options,
    )
