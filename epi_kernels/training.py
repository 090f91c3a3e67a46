"""What every command that trains a model needs: parameters in groups, bytes of an optimizer's state."""

from __future__ import annotations

from typing import Any

import torch


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of (name, parameter) pairs: matrices with weight decay; norms and biases (one dimension) without.

    Names go along, so that importance is carried over by name. Parameters that do not train, and a group without
    any, are left out.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [pair for pair in named if pair[1].ndim >= 2], "weight_decay": weight_decay},
        {"params": [pair for pair in named if pair[1].ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def state_bytes(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of an optimizer's state by kind, and their "total": MaskedEMAAdamW's own account, or torch.optim.AdamW's tensors."""
    own = getattr(optimizer, "state_bytes", None)
    if own is not None:
        return own()
    kinds = {"exp_avg": 0, "exp_avg_sq": 0, "other": 0}
    for state in optimizer.state.values():
        for name, value in state.items():
            kinds[name if name in kinds else "other"] += value.numel() * value.element_size()
    return {**kinds, "total": sum(kinds.values())}
