"""The operators of the compiled libraries, ``torch.ops.epi_kernels``, and what they are to tensors without memory.

Most of what a stage writes lies behind the addresses in its table, which no schema names: a compiler that met these
operators could not tell what they read and write, and ``MaskedEMAAdamW`` keeps them out of compiled graphs
(optim/uncompiled.py). What a schema does name is complete. ``watch``, ``unwatch`` and ``unmoved`` are about memory alone
and have no fake.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

# Stages write into their arguments and return nothing.
CPU_STAGES = ("cpu_step", "cpu_accumulate", "cpu_count", "cpu_find_thresholds", "cpu_select")
CUDA_STAGES = ("cuda_prepare", "cuda_step", "cuda_stats", "cuda_merge_stats", "cuda_count", "cuda_select")


def cpu_operators() -> Any:
    """
    Raises:
        ImportError: the extension is not built, or does not load.
    """
    importlib.import_module("epi_kernels._C")  # registers the operators
    _register_fakes(CPU_STAGES)
    return torch.ops.epi_kernels


def cuda_operators() -> Any:
    """
    Raises:
        ImportError: the extension was built without CUDA, or does not load.
    """
    importlib.import_module("epi_kernels._C_cuda")
    _register_fakes(CUDA_STAGES)
    return torch.ops.epi_kernels


@functools.cache  # once
def _register_fakes(stages: tuple[str, ...]) -> None:
    for stage in stages:
        torch.library.register_fake(f"epi_kernels::{stage}", _writes_only)


def _writes_only(*arguments: Any) -> None:
    """The fake of a stage."""
