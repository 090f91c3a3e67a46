"""The safetensors file that `save_isolation` writes, and its reading.

NAME                  importance, of the parameter's shape: fp32, bf16 or fp64 as it is stored; 8-bit codes as the bf16
                      values that they stand for, exactly
isolation_mask/NAME   uint8 [ceil(n / 8)]: element i, row-major, is bit i % 8 of byte i // 8; bits past the last are 0
persistent_mask/NAME  the same, where there is one

The metadata say what it is (`format`, `version`) and of whom: `parameters` is a JSON object, name -> shape, step and
beta, and which masks it has. The importance is an average that began at 0: divided by 1 - beta^step it is the mean
squared gradient. A parameter that was never stepped has step null and no importance. Names are without DDP's and
torch.compile's prefixes.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epi_kernels.optim.masks import MASK_KEYS

FORMAT = "epi-kernels isolation"
VERSION = "1"
IMPORTANCE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class SavedParameter:
    """One parameter in a file. ``importance`` is None where it was never stepped."""

    shape: torch.Size
    step: int
    beta: float
    importance: Tensor | None
    masks: dict[str, Tensor]  # by state key, packed; their lengths are not yet checked


@dataclass(frozen=True)
class SavedIsolation:
    """A whole file: T of the optimizer that wrote it, and its parameters by name."""

    isolation_step: int
    parameters: dict[str, SavedParameter]


def read(path: str | os.PathLike[str]) -> SavedIsolation:
    """A file that `save_isolation` wrote, its tensors mapped from it.

    Raises:
        ValueError: it is damaged, no file of ours, or of another version.
        OSError: there is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path}: not written by save_isolation (its format is {metadata.get('format')!r})"
                )
            if metadata.get("version") != VERSION:
                raise ValueError(
                    f"{path}: has version {metadata.get('version')!r}; this release reads {VERSION!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: no whole safetensors file ({error})") from None
    try:
        records = json.loads(metadata["parameters"])
        parameters = {name: _take(name, record, tensors) for name, record in records.items()}
        isolation_step = int(metadata["isolation_step"])
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    if tensors:
        raise ValueError(f"{path}: damaged (holds {', '.join(sorted(tensors)[:5])}, of no parameter)")
    return SavedIsolation(isolation_step, parameters)


def _take(name: str, record: dict[str, Any], tensors: dict[str, Tensor]) -> SavedParameter:
    """One parameter's part, taken out of ``tensors``."""
    shape, importance = torch.Size(record["shape"]), None
    step, beta = 0, 0.0
    if record["step"] is not None:
        step, beta = int(record["step"]), float(record["beta"])
        if step < 0 or not 0 <= beta < 1:
            raise ValueError(f"{name} has step {step} and beta {beta}")
        importance = tensors.pop(name, None)
        if importance is None:
            raise ValueError(f"the importance of {name} is not in it")
        if importance.dtype not in IMPORTANCE_DTYPES or importance.shape != shape:
            found = f"{importance.dtype} {list(importance.shape)}"
            raise ValueError(f"the importance of {name} must be floats {list(shape)}, is {found}")
        if not bool((importance >= 0).all()):  # so of nan; inf is a square that float32 does not hold
            raise ValueError(f"the importance of {name} has values that are negative or not a number")
    masks = {}
    for key in MASK_KEYS:
        mask = tensors.pop(f"{key}/{name}", None)
        if mask is not None:
            if mask.dtype != torch.uint8:
                raise ValueError(f"{key} of {name} must be packed, uint8, is {mask.dtype}")
            masks[key] = mask
    lost = set(record.get("masks", masks)) - set(masks)  # earlier releases do not say which there are
    if lost:
        raise ValueError(f"the {' and '.join(sorted(lost))} of {name} is not in it")
    return SavedParameter(shape, step, beta, importance, masks)
