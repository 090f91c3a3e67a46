"""exp_avg, exp_avg_sq and importance in a parameter's state: their dtypes, their making, and other dtypes' values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from epi_kernels.distributed.shards import local, wrap
from epi_kernels.optim.arguments import IsolationConfig
from epi_kernels.optim.home import home_zeros
from epi_kernels.reference import codec

MOMENT_KEYS = ("exp_avg", "exp_avg_sq", "importance")
SCALE_OF = {key: f"{key}_scale" for key in MOMENT_KEYS}  # beside codes, uint8 [ceil(n / 64)]
INT8 = torch.uint8  # how 8-bit codes are stored


def moment_dtype(key: str, param: Tensor, config: IsolationConfig) -> torch.dtype:
    """Tensors too small for blocks to pay keep float32 where codes are asked for."""
    dtype = config.importance_dtype if key == "importance" else config.state_dtype
    if dtype is None:
        return param.dtype
    if dtype == INT8 and param.numel() < codec.MIN_ELEMENTS:
        return torch.float32
    return dtype


def new_moment(key: str, param: Tensor, config: IsolationConfig) -> dict[str, Tensor]:
    """Zeros, with their scales where they are codes: of what lies on this rank, as DTensors where ``param`` is one."""
    dtype = moment_dtype(key, param, config)
    # row-major whatever the parameter's strides: masks, blocks and random numbers count logical positions
    weight = local(param)
    made = {key: wrap(home_zeros(weight.shape, dtype, param, config), param)}
    if dtype == INT8:
        n_scales = codec.scale_bytes(weight.numel())
        made[SCALE_OF[key]] = home_zeros((n_scales,), torch.uint8, param, config)
    return made


def read_moment(entry: Mapping[str, Any], key: str, shape: torch.Size, what: str) -> Tensor:
    """The values of a moment in somebody's state: floats of ``shape``.

    Raises:
        ValueError: it is none, has another shape, or codes without their scales.
    """
    value, scales = entry[key], entry.get(SCALE_OF[key])
    if (
        isinstance(value, Tensor)
        and value.shape == shape
        and value.layout == torch.strided
        and not value.is_meta
    ):
        if value.is_floating_point() and scales is None:
            return value.detach()
        n_scales = codec.scale_bytes(value.numel())
        if (
            value.dtype == INT8
            and isinstance(scales, Tensor)
            and scales.dtype == torch.uint8
            and scales.shape == (n_scales,)
        ):
            codes = value.detach().reshape(-1)
            return codec.decode(codes, scales.to(codes.device), signed=key == "exp_avg").view(shape)
    got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(type(value))
    raise ValueError(
        f"{what}: {key} must be floats of shape {list(shape)}, or uint8 codes with {SCALE_OF[key]} "
        f"(uint8, one a block of {codec.BLOCK}), got {got}"
    )


def write_moment(state: dict[str, Any], key: str, values: Tensor) -> None:
    """``values`` into a moment of ours, rounded to nearest where it is narrower."""
    target = local(state[key])
    if SCALE_OF[key] not in state:
        target.copy_(values)
        return
    flat = values.to(device=target.device, dtype=torch.float32).reshape(-1)
    codes, scales = codec.encode(flat, None, signed=key == "exp_avg")
    target.copy_(codes.view(target.shape))
    state[SCALE_OF[key]].copy_(scales)


def load_moment(
    entry: Mapping[str, Any], key: str, param: Tensor, config: IsolationConfig, what: str
) -> dict[str, Tensor]:
    """A moment of a saved state as ours: codes for codes to the bit, anything else by value."""
    values = read_moment(entry, key, local(param).shape, what)
    made = new_moment(key, param, config)
    if made[key].dtype == INT8 and entry[key].dtype == INT8:
        for part in (key, SCALE_OF[key]):
            local(made[part]).copy_(entry[part].detach())
    else:
        write_moment(made, key, values)
    return made
