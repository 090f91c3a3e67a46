"""The optimizer inside what a training library puts around it."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import Optimizer

from epi_kernels.optim.masked_ema_adamw import MaskedEMAAdamW


def inside(optimizer: Any) -> Any:
    """What is under Accelerate's AcceleratedOptimizer, Lightning's LightningOptimizer and their like, which may call
    themselves of its class."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def unwrapped(optimizer: Any, what: str) -> MaskedEMAAdamW:
    """
    Raises:
        TypeError: it is no MaskedEMAAdamW, which ``what``.
    """
    ours = inside(optimizer)
    if not isinstance(ours, MaskedEMAAdamW):
        raise TypeError(f"{what} a MaskedEMAAdamW, got {type(ours).__name__}")
    return ours
