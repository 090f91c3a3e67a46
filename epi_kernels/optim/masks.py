"""Masks that a caller installs: checked, packed, and laid over what is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from epi_kernels.distributed.shards import is_sharded, local, shard_of, wrap
from epi_kernels.optim.arguments import IsolationConfig
from epi_kernels.optim.home import home_zeros
from epi_kernels.reference.bits import pack, packed_bytes, unpack

MASK_KEYS = ("isolation_mask", "persistent_mask")


def zero_mask(param: Tensor, config: IsolationConfig | None = None) -> Tensor:
    """Of what lies on this rank; without ``config`` beside it."""
    return home_zeros((packed_bytes(local(param).numel()),), torch.uint8, param, config)


def unpacked_mask(masks: Mapping[str, Any], param: Tensor) -> Tensor:
    """bool of param's shape (a DTensor with its placements where it is one), a copy."""
    weight, packed = local(param), masks.get("isolation_mask")
    if packed is None:
        mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    else:
        mask = unpack(packed.to(weight.device), weight.numel()).view(weight.shape)
    return wrap(mask, param)


def load_mask(value: Any, weight: Tensor, what: str, config: IsolationConfig | None = None) -> Tensor:
    """A mask from a state dict, packed (uint8 [ceil(n / 8)]) or as bools of weight's shape; packed, a copy."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{what}: a mask is a tensor, got {type(value).__name__}")
    expected = packed_bytes(weight.numel())
    mask = home_zeros((expected,), torch.uint8, weight, config)
    if value.dtype == torch.bool and value.shape == weight.shape:
        return mask.copy_(pack(value))
    if value.dtype != torch.uint8 or value.shape != (expected,):
        raise ValueError(
            f"{what}: a packed mask of {weight.numel()} elements is uint8 [{expected}], "
            f"got {value.dtype} {list(value.shape)}; the state is truncated or not ours"
        )
    mask.copy_(value.detach())
    spare = -weight.numel() % 8
    if spare and int(mask[-1]) >> (8 - spare):
        raise ValueError(f"{what}: padding bits past element {weight.numel()} are set; the state is damaged")
    return mask


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
    if is_sharded(mask):
        like = is_sharded(param) and mask.device_mesh == param.device_mesh
        if not like or mask.placements != getattr(param, "placements", None):
            raise ValueError("a mask that is a DTensor must have the parameter's mesh and placements")


def _part(mask: Tensor, param: Tensor) -> Tensor:
    """What of the mask lies on this rank; a plain mask is of the whole parameter."""
    if is_sharded(param) and not is_sharded(mask):
        shard = shard_of(param)
        assert shard is not None, "refused when the parameter joined"
        return mask[shard.slices]
    return local(mask)


def install_mask(
    state: dict[str, Any], param: Tensor, mask: Tensor, config: IsolationConfig, *, persistent: bool
) -> None:
    """Until the next refresh, beside persistent bits; or as the persistent bits, beside the others."""
    packed = zero_mask(param, config).copy_(pack(_part(mask, param)))
    current = state.setdefault("isolation_mask", zero_mask(param, config))
    lasting = state.pop("persistent_mask", None)
    # in place: a captured graph goes on reading there
    if persistent:
        others = current if lasting is None else current & ~lasting
        current.copy_(others | packed)
        # on all ranks or on none; of a DTensor each knows its own part alone
        if is_sharded(mask) or bool(mask.any()):
            state["persistent_mask"] = packed
    elif lasting is None:
        current.copy_(packed)
    else:
        current.copy_(packed | lasting)
        state["persistent_mask"] = lasting


def put_back_persistent(state: dict[str, Any], what: str) -> None:
    """Lays a persistent mask that came by itself over the other one, which has its bits where it came from the same state.

    Raises:
        ValueError: it has not: they are of two parameters.
    """
    lasting = state["persistent_mask"]
    current = state.setdefault("isolation_mask", lasting.clone())
    if bool((lasting & ~current).any()):
        raise ValueError(
            f"{what}: the persistent mask has bits that the isolation mask lacks, as of another parameter: give the optimizer "
            "its parameters in the order of the one that was saved"
        )
