"""Corrections of bfloat16 weights in a parameter's state (reference/master.py): their making, and other widths' values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from epi_kernels.distributed.shards import local, wrap
from epi_kernels.optim.arguments import IsolationConfig
from epi_kernels.optim.home import home_zeros
from epi_kernels.reference import master

CORRECTION_KEY = "weight_correction"


def new_correction(param: Tensor, config: IsolationConfig) -> dict[str, Tensor]:
    """Zeros of ``param``'s shape; nothing where ``param`` has all the bits that were asked for."""
    if param.dtype != torch.bfloat16 or config.master_weight_bits == 16:
        return {}
    dtype = master.CORRECTION_DTYPES[config.master_weight_bits]
    # row-major whatever the parameter's strides, as the moments are
    weight = local(param)
    return {CORRECTION_KEY: wrap(home_zeros(weight.shape, dtype, param, config), param)}


def load_correction(
    saved: Mapping[str, Any], param: Tensor, config: IsolationConfig, what: str
) -> dict[str, Tensor]:
    """The correction of a saved state in our width, zeros where it has none.

    Raises:
        ValueError: what is saved there is no correction of ``param``.
    """
    made, value, shape = new_correction(param, config), saved.get(CORRECTION_KEY), local(param).shape
    if CORRECTION_KEY in saved and not (
        isinstance(value, Tensor)
        and value.dtype in master.CORRECTION_DTYPES.values()
        and value.shape == shape
        and value.layout == torch.strided
        and not value.is_meta
    ):
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(type(value))
        raise ValueError(f"{what}: {CORRECTION_KEY} must be int8 or int16 of shape {list(shape)}, got {got}")
    if value is not None:
        for ours in made.values():
            local(ours).copy_(master.converted(value.detach(), ours.dtype))
    return made


def master_weight(param: Tensor, state: Mapping[str, Any]) -> Tensor:
    """fp32 (fp64 of fp64), a copy, a DTensor where ``param`` is one: the weight that the step computes with."""
    weight, correction = local(param.detach()), state.get(CORRECTION_KEY)
    if correction is None:
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        return wrap(weight.to(wide, copy=True), param)
    low = local(correction).to(weight.device).reshape(-1)  # offloaded, it lies on the host
    return wrap(master.join(weight.reshape(-1), low).view(weight.shape), param)
