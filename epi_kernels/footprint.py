"""Bytes of an optimizer's state, from the sizes of its parameters and its options: nothing is allocated.

``sizes`` are elements, one number a parameter tensor. Keys are those of ``MaskedEMAAdamW.state_bytes()``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from epi_kernels.reference import codec, master, nibbles
from epi_kernels.reference.bits import packed_bytes

STEP_BYTES = 4  # a float32 counter a tensor


def moment_bytes(n_elements: int, dtype: torch.dtype | str) -> int:
    """Of one moment of one tensor; "int8" and "int4" with their scales, and float32 where the tensor is too small."""
    if isinstance(dtype, torch.dtype):
        return n_elements * dtype.itemsize
    if n_elements < codec.MIN_ELEMENTS:
        return n_elements * torch.float32.itemsize
    if dtype == "int4":
        return nibbles.packed_bytes(n_elements) + codec.scale_bytes(n_elements) * nibbles.SCALE_DTYPE.itemsize
    return n_elements + codec.scale_bytes(n_elements)


def adamw(sizes: Sequence[int], dtype: torch.dtype) -> dict[str, int]:
    """``torch.optim.AdamW`` over parameters of ``dtype``, which its states have too."""
    moment = sum(sizes) * dtype.itemsize
    return _with_total({"exp_avg": moment, "exp_avg_sq": moment, "other": STEP_BYTES * len(sizes)})


def masked_ema_adamw(
    sizes: Sequence[int],
    dtype: torch.dtype,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    isolation_ratio: float = 0.01,
    importance_beta: float | None = None,
    importance_dtype: torch.dtype | str = torch.float32,
    state_dtype: torch.dtype | str | None = None,
    master_weight_bits: int = 16,
    persistent_masks: bool = False,
) -> dict[str, int]:
    """``MaskedEMAAdamW`` with these options over parameters of ``dtype``.

    ``persistent_masks``: a caller installs one for every parameter.
    """
    moment = sum(moment_bytes(n, state_dtype or dtype) for n in sizes)
    own = importance_beta not in (None, betas[1])
    masks = sum(map(packed_bytes, sizes))
    correction = master.CORRECTION_DTYPES.get(master_weight_bits) if dtype == torch.bfloat16 else None
    corrections = {} if correction is None else {"weight_correction": sum(sizes) * correction.itemsize}
    return _with_total(
        {
            "exp_avg": moment,
            "exp_avg_sq": moment,
            "importance": sum(moment_bytes(n, importance_dtype) for n in sizes) if own else 0,
            "isolation_mask": masks if isolation_ratio > 0 or persistent_masks else 0,
            "persistent_mask": masks if persistent_masks else 0,
            **corrections,
            "other": STEP_BYTES * len(sizes),
        }
    )


def _with_total(kinds: dict[str, int]) -> dict[str, int]:
    return {**kinds, "total": sum(kinds.values())}
