"""Options of MaskedEMAAdamW as YAML and TOML can say them: without dtypes and functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from epi_kernels.integrations.groups import transformer_block

PLAIN = {
    "state_dtype": {"float32": torch.float32, "bfloat16": torch.bfloat16},
    "importance_dtype": {"float32": torch.float32, "bfloat16": torch.bfloat16},
    "layer_key": {"block": transformer_block},
}


def from_plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments: what ``PLAIN`` lists gets its meaning, the rest is the optimizer's to accept or refuse."""
    made = {}
    for name, value in options.items():
        meanings = PLAIN.get(name, {})
        made[name] = meanings.get(value, value) if isinstance(value, str) else value
    return made
