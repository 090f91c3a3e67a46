"""Masks that a caller installs: checked, packed, and laid over what is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epi_kernels.optim.state import zero_mask
from epi_kernels.reference.bits import pack


def check_mask(mask: Any, param: Tensor) -> None:
    """
    Raises:
        TypeError: the mask is no dense bool tensor.
        ValueError: its shape or device is not the parameter's.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.layout != torch.strided:
        raise TypeError(f"mask must be a dense bool tensor, got {mask.layout}: use .to_dense()")
    if mask.shape != param.shape:
        raise ValueError(f"mask must have the parameter's shape {list(param.shape)}, got {list(mask.shape)}")
    if mask.device != param.device:
        raise ValueError(f"mask must be on the parameter's device {param.device}, got {mask.device}")


def install_mask(state: dict[str, Any], param: Tensor, mask: Tensor, *, persistent: bool) -> None:
    """Until the next refresh, beside persistent bits; or as the persistent bits, beside the others."""
    packed = pack(mask)
    current = state.setdefault("isolation_mask", zero_mask(param))
    lasting = state.pop("persistent_mask", None)
    if persistent:
        others = current if lasting is None else current & ~lasting
        state["isolation_mask"] = others | packed
        if bool(packed.any()):
            state["persistent_mask"] = packed
    elif lasting is None:
        state["isolation_mask"] = packed
    else:
        state["isolation_mask"], state["persistent_mask"] = packed | lasting, lasting
