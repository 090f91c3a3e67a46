"""MaskedEMAAdamW in the tools people fine-tune with; each module imports its tool and nothing else does."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "add_isolation_callback",
    "load_checkpoint",
    "masked_ema_adamw",
    "named_parameter_groups",
    "save_checkpoint",
    "transformer_block",
]

# public name -> module that defines it: groups need torch alone
_LAZY = {
    "add_isolation_callback": "epi_kernels.integrations.transformers",
    "load_checkpoint": "epi_kernels.integrations.checkpoints",
    "masked_ema_adamw": "epi_kernels.integrations.transformers",
    "named_parameter_groups": "epi_kernels.integrations.groups",
    "save_checkpoint": "epi_kernels.integrations.checkpoints",
    "transformer_block": "epi_kernels.integrations.groups",
}

if TYPE_CHECKING:
    from .checkpoints import load_checkpoint, save_checkpoint
    from .groups import named_parameter_groups, transformer_block
    from .transformers import add_isolation_callback, masked_ema_adamw


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'epi_kernels.integrations' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
