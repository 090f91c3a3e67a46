"""Bytes of an optimizer's state, from the sizes of its parameters and its options: nothing is allocated.

``sizes`` are elements, one number a parameter tensor. Keys are those of ``MaskedEMAAdamW.state_bytes()``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from epi_kernels.reference import codec, master, nibbles, runs
from epi_kernels.reference.bits import packed_bytes

STEP_BYTES = 4  # a float32 counter a tensor


def moment_bytes(n_elements: int, dtype: torch.dtype | str, n_stored: int | None = None) -> tuple[int, ...]:
    """Of one moment of one tensor; "int8" and "int4" beside their scales, and float32 where the tensor is too small.

    ``n_stored``: elements that have state, where not all have.
    """
    stored = n_elements if n_stored is None else n_stored
    if isinstance(dtype, torch.dtype):
        return (stored * dtype.itemsize,)
    if n_elements < codec.MIN_ELEMENTS:
        return (stored * torch.float32.itemsize,)
    if dtype == "int4":
        return nibbles.packed_bytes(stored), codec.scale_bytes(stored) * nibbles.SCALE_DTYPE.itemsize
    return stored, codec.scale_bytes(stored)


def isolated_rows(n_elements: int, share: float) -> tuple[int, int]:
    """(elements that have state, bytes of the persistent mask) of a tensor whose first ``share`` is isolated for good with
    ``isolation_granularity`` "row" or "block": whole blocks of 64 elements, as rows are whose length is a multiple of 64.
    """
    isolated = n_elements if share == 1 else math.floor(share * n_elements) // runs.BLOCK * runs.BLOCK
    stored = n_elements - isolated
    n_runs = int(stored > 0)
    if runs.pays(stored, n_runs, n_elements):
        return stored, runs.BYTES_A_RUN * (n_runs + 1)
    return n_elements, packed_bytes(n_elements) if isolated else 0


def adamw(sizes: Sequence[int], dtype: torch.dtype) -> dict[str, int]:
    """``torch.optim.AdamW`` over parameters of ``dtype``, which its states have too."""
    moment = sum(sizes) * dtype.itemsize
    return _with_total({"exp_avg": moment, "exp_avg_sq": moment, "other": STEP_BYTES * len(sizes)})


def masked_ema_adamw(sizes: Sequence[int], dtype: torch.dtype, **options: Any) -> dict[str, int]:
    """``MaskedEMAAdamW`` over parameters of ``dtype``; ``options`` as ``tensors`` takes them."""
    kinds: dict[str, int] = {}
    for n in sizes:
        for kind, parts in tensors(n, dtype, **options).items():
            kinds[kind] = kinds.get(kind, 0) + sum(parts)
    return _with_total(kinds | {"other": STEP_BYTES * len(sizes)})


def tensors(
    n_elements: int,
    dtype: torch.dtype,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    isolation_ratio: float = 0.01,
    importance_beta: float | None = None,
    importance_dtype: torch.dtype | str = torch.float32,
    state_dtype: torch.dtype | str | None = None,
    master_weight_bits: int = 16,
    persistent_masks: bool = False,
    isolated_rows_share: float | None = None,
) -> dict[str, tuple[int, ...]]:
    """Bytes of each tensor of one parameter's state, by kind, beside its step counter.

    ``persistent_masks``: a caller installs one for every parameter; with ``isolated_rows_share`` (0 to 1) of whole rows in
    one piece that begins every parameter, with ``isolation_granularity="row"``.
    """
    stored, persistent = n_elements, packed_bytes(n_elements) if persistent_masks else 0
    if isolated_rows_share is not None:
        stored, persistent = isolated_rows(n_elements, isolated_rows_share)
    moment = moment_bytes(n_elements, state_dtype or dtype, stored)
    own = importance_beta not in (None, betas[1])
    masked = isolation_ratio > 0 or persistent
    correction = master.CORRECTION_DTYPES.get(master_weight_bits) if dtype == torch.bfloat16 else None
    corrections = {} if correction is None else {"weight_correction": (n_elements * correction.itemsize,)}
    return {
        "exp_avg": moment,
        "exp_avg_sq": moment,
        "importance": moment_bytes(n_elements, importance_dtype, stored) if own else (),
        "isolation_mask": (packed_bytes(stored),) if masked else (),
        "persistent_mask": (persistent,) if persistent else (),
        **corrections,
    }


def _with_total(kinds: dict[str, int]) -> dict[str, int]:
    return {**kinds, "total": sum(kinds.values())}
