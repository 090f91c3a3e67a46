"""exp_avg, exp_avg_sq and importance in a parameter's state: their dtypes, their making, and other dtypes' values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from epi_kernels.distributed.shards import local, wrap
from epi_kernels.optim.arguments import INT4, INT8, IsolationConfig
from epi_kernels.optim.home import home_zeros
from epi_kernels.reference import codec, nibbles

MOMENT_KEYS = ("exp_avg", "exp_avg_sq", "importance")
# beside codes: [ceil(n / 64)], uint8 of 8-bit codes and bfloat16 of 4-bit ones, which are packed, [ceil(n / 2)]
SCALE_OF = {key: f"{key}_scale" for key in MOMENT_KEYS}
NIBBLE_KEYS = MOMENT_KEYS[:2]


def moment_dtype(key: str, param: Tensor, config: IsolationConfig) -> torch.dtype:
    """Tensors too small for blocks to pay keep float32 where codes are asked for."""
    dtype = config.importance_dtype if key == "importance" else config.state_dtype
    if dtype is None:
        return param.dtype
    if dtype in (INT8, INT4) and param.numel() < codec.MIN_ELEMENTS:
        return torch.float32
    return dtype


def new_moment(key: str, param: Tensor, config: IsolationConfig) -> dict[str, Tensor]:
    """Zeros, with their scales where they are codes: of what lies on this rank, as DTensors where ``param`` is one.

    Packed codes and scales are plain tensors.
    """
    dtype = moment_dtype(key, param, config)
    # row-major whatever the parameter's strides: masks, blocks and random numbers count logical positions
    weight = local(param)
    n_scales = codec.scale_bytes(weight.numel())
    if dtype == INT4:
        packed = (nibbles.packed_bytes(weight.numel()),)
        return {
            key: home_zeros(packed, torch.uint8, param, config),
            SCALE_OF[key]: home_zeros((n_scales,), nibbles.SCALE_DTYPE, param, config),
        }
    made = {key: wrap(home_zeros(weight.shape, dtype, param, config), param)}
    if dtype == INT8:
        made[SCALE_OF[key]] = home_zeros((n_scales,), torch.uint8, param, config)
    return made


def has_nibbles(entry: Mapping[str, Any], key: str, n_elements: int) -> bool:
    """Whether ``key`` and all that it is read by are packed 4-bit codes of so many elements."""
    parts = NIBBLE_KEYS if key == "exp_avg" else (key,)
    return key in NIBBLE_KEYS and all(
        isinstance(entry.get(part), Tensor)
        and entry[part].dtype == torch.uint8
        and entry[part].shape == (nibbles.packed_bytes(n_elements),)
        and isinstance(entry.get(SCALE_OF[part]), Tensor)
        and entry[SCALE_OF[part]].dtype == nibbles.SCALE_DTYPE
        and entry[SCALE_OF[part]].shape == (codec.scale_bytes(n_elements),)
        for part in parts
    )


def read_moment(entry: Mapping[str, Any], key: str, shape: torch.Size, what: str) -> Tensor:
    """The values of a moment in somebody's state: floats of ``shape``.

    Raises:
        ValueError: it is none, has another shape, or codes without their scales.
    """
    value, scales = entry[key], entry.get(SCALE_OF[key])
    if has_nibbles(entry, key, shape.numel()):
        return _read_nibbles(entry, key, shape)
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
        f"(one a block of {codec.BLOCK}; uint8 of codes of this shape, bfloat16 of two codes a byte, exp_avg beside "
        f"exp_avg_sq), got {got}"
    )


def _read_nibbles(entry: Mapping[str, Any], key: str, shape: torch.Size) -> Tensor:
    n, device = shape.numel(), entry[key].device
    codes = {
        part: nibbles.unpack(entry[part].detach().to(device), n) for part in NIBBLE_KEYS if part in entry
    }
    scales = entry[SCALE_OF[key]].to(device)
    if key == "exp_avg":
        return nibbles.decode_exp_avg(codes[key], scales, codes["exp_avg_sq"]).view(shape)
    return nibbles.decode_exp_avg_sq(codes[key], scales).view(shape)


def write_moment(state: dict[str, Any], key: str, values: Tensor) -> None:
    """``values`` into a moment of ours, rounded to nearest where it is narrower; 4-bit ``exp_avg_sq`` before ``exp_avg``."""
    target = local(state[key])
    if SCALE_OF[key] not in state:
        target.copy_(values)
        return
    flat = values.to(device=target.device, dtype=torch.float32).reshape(-1)
    if state[SCALE_OF[key]].dtype == nibbles.SCALE_DTYPE:
        codes, scales = _as_nibbles(state, key, flat)
    else:
        codes, scales = codec.encode(flat, None, signed=key == "exp_avg")
    target.copy_(codes.view(target.shape))
    state[SCALE_OF[key]].copy_(scales)


def _as_nibbles(state: Mapping[str, Any], key: str, values: Tensor) -> tuple[Tensor, Tensor]:
    if key == "exp_avg":
        second = nibbles.unpack(state["exp_avg_sq"], values.numel()), state[SCALE_OF["exp_avg_sq"]]
        codes, scales = nibbles.encode_exp_avg(values, None, second)
    else:
        codes, scales = nibbles.encode_exp_avg_sq(values, None, None)
    return nibbles.pack(codes), scales


def load_moments(
    entry: Mapping[str, Any], keys: tuple[str, ...], param: Tensor, config: IsolationConfig, what: str
) -> dict[str, Tensor]:
    """Moments of a saved state as ours: codes for codes to the bit, anything else by value."""
    shape = local(param).shape
    values = {key: read_moment(entry, key, shape, what) for key in keys}
    made: dict[str, Tensor] = {}
    for key in sorted(keys, key=("exp_avg_sq", "exp_avg", "importance").index):
        made.update(new_moment(key, param, config))
        if _same_codes(made, entry, key):
            for part in (key, SCALE_OF[key]):
                local(made[part]).copy_(entry[part].detach())
        else:
            write_moment(made, key, values[key])
    # in the order of a state that steps have made
    return {part: made[part] for key in keys for part in (key, SCALE_OF[key]) if part in made}


def _same_codes(made: Mapping[str, Tensor], entry: Mapping[str, Any], key: str) -> bool:
    scale = SCALE_OF[key]
    return scale in made and scale in entry and made[scale].dtype == entry[scale].dtype
