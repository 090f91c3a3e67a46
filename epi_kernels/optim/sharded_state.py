"""State of sharded parameters in a state dict: every tensor a DTensor of its parameter's shape, so that it reshards.

A packed mask, packed 4-bit codes and a scale a block of 64 have shapes of their own, which no other number of ranks
could cut. In a state dict a mask is bools, a code has a byte and a scale beside it; they are made for the dict and
packed again by loading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from epi_kernels.distributed.shards import is_sharded, local, shard_of, wrap
from epi_kernels.optim.arguments import INT8
from epi_kernels.optim.masks import MASK_KEYS, zero_mask
from epi_kernels.optim.moments import NIBBLE_KEYS, SCALE_OF
from epi_kernels.reference import bits, codec, nibbles

OURS = "epi_kernels.integrations.save_checkpoint and load_checkpoint"
_CODES_OF = {scale: key for key, scale in SCALE_OF.items()}


def exported(state: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """A sharded parameter's state as a state dict holds it.

    Both masks are always there, without bits where none is in use: a load in place
    (``torch.distributed.checkpoint.load``) fills what the dict of a fresh optimizer holds, and drops what it lacks.
    """
    weight = local(param)
    found = dict(state)
    for key in MASK_KEYS:
        found.setdefault(key, zero_mask(param))
    for key, value in found.items():
        if key in NIBBLE_KEYS and _is_nibbles(found, key):
            found[key] = wrap(nibbles.unpack(value, weight.numel()).view(weight.shape), param)
        elif key in MASK_KEYS:
            found[key] = wrap(bits.unpack(value, weight.numel()).view(weight.shape), param)
        elif key in _CODES_OF:
            each = value.repeat_interleave(codec.BLOCK)[: weight.numel()]
            found[key] = wrap(each.view(weight.shape), param)
    return found


def export_states(states: dict[Any, dict[str, Any]], params: Sequence[Tensor]) -> None:
    """Puts ``exported`` in a state dict's ``state``, by the numbers that ``params`` have there."""
    for number, param in enumerate(params):
        if is_sharded(param) and number in states:
            states[number] = exported(states[number], param)


def localized(saved: Mapping[str, Any], param: Tensor, what: str) -> dict[str, Any]:
    """A saved state as this rank's part of ``param`` wants it: plain tensors, a scale a block of this rank's.

    Codes whose blocks began elsewhere come back as the floats they stand for.

    Raises:
        ValueError: a DTensor laid out otherwise or cut out of something packed, or a tensor that is no part of a whole of
            ``param``'s shape.
    """
    found = {key: _part(key, value, saved, param, f"{what}, {key}") for key, value in saved.items()}
    _join_nibbles(found)
    for scale_key, key in _CODES_OF.items():
        codes, scales = found.get(key), found.get(scale_key)
        if not isinstance(codes, Tensor) or not isinstance(scales, Tensor) or codes.shape != scales.shape:
            continue
        if codes.dtype != INT8 or scales.dtype != torch.uint8:
            continue
        of_blocks = _of_blocks(scales)
        if of_blocks is not None:
            found[scale_key] = of_blocks
        else:
            found[key] = codec.decode_each(codes, scales, signed=key == "exp_avg")
            del found[scale_key]
    return found


def _of_blocks(scales: Tensor) -> Tensor | None:
    """A scale a block of 64, where scales beside every code say no more."""
    each = scales.reshape(-1)
    of_blocks = each[:: codec.BLOCK].contiguous()
    same = torch.equal(_words(of_blocks.repeat_interleave(codec.BLOCK)[: each.numel()]), _words(each))
    return of_blocks if same else None


def _words(scales: Tensor) -> Tensor:
    """Compared as they are stored: a NaN is itself."""
    return scales if scales.dtype == torch.uint8 else scales.view(torch.int16)


def _is_nibbles(entry: Mapping[str, Any], key: str) -> bool:
    """Whether ``key`` are 4-bit codes, packed or a byte each."""
    value, scales = entry.get(key), entry.get(SCALE_OF[key])
    return (
        isinstance(value, Tensor)
        and isinstance(scales, Tensor)
        and value.dtype == torch.uint8
        and scales.dtype == nibbles.SCALE_DTYPE
    )


def _join_nibbles(found: dict[str, Any]) -> None:
    """4-bit codes of a byte each packed; both moments as floats where the blocks of one began elsewhere."""
    if not all(
        _is_nibbles(found, key) and found[key].shape == found[SCALE_OF[key]].shape for key in NIBBLE_KEYS
    ):
        return
    codes, scales = [found[key] for key in NIBBLE_KEYS], [found[SCALE_OF[key]] for key in NIBBLE_KEYS]
    of_blocks = [_of_blocks(one) for one in scales]
    floats = any(one is None for one in of_blocks)
    if floats:
        found["exp_avg"] = nibbles.decode_exp_avg_each(codes[0], scales[0], codes[1])
        found["exp_avg_sq"] = nibbles.decode_exp_avg_sq_each(codes[1], scales[1])
    for key, code, one in zip(NIBBLE_KEYS, codes, of_blocks, strict=True):
        if floats:
            del found[SCALE_OF[key]]
        else:
            found[key], found[SCALE_OF[key]] = nibbles.pack(code.reshape(-1)), one


def compact(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A sharded parameter's state, gathered whole, in the form that one process saves: masks packed, a scale a block.

    Where a rank's blocks began inside the whole's, scales stay beside every code: both forms load.
    """
    found = dict(entry)
    for key in MASK_KEYS:
        if key in found:
            found[key] = bits.pack(found[key])
    if "persistent_mask" in found and not bool(found["persistent_mask"].any()):
        del found["persistent_mask"]  # `exported` had put it there
    blocks = {key: _of_blocks(found[key]) for key in _CODES_OF if key in found}
    whole = all(one is not None for one in blocks.values())
    for scale_key, of_blocks in blocks.items():
        key = _CODES_OF[scale_key]
        if _is_nibbles(found, key):  # one moment is read by the other
            if whole:
                found[key], found[scale_key] = nibbles.pack(found[key].reshape(-1)), of_blocks
        elif of_blocks is not None:
            found[scale_key] = of_blocks
    return found


def _part(key: str, value: Any, saved: Mapping[str, Any], param: Tensor, what: str) -> Any:
    if not isinstance(value, Tensor) or key == "step":
        return value
    if is_sharded(value):
        if not is_sharded(param):
            raise ValueError(
                f"{what}: a DTensor, but the parameter is not sharded: gather with StateDictOptions(full_state_dict=True), or "
                f"use {OURS}"
            )
        if value.dtype != torch.bool if key in MASK_KEYS else key in _CODES_OF and value.shape != param.shape:
            raise ValueError(
                f"{what}: a whole parameter's, packed, which torch has cut as if it had the parameter's shape. Between whole and "
                f"sharded parameters use {OURS}, or give load_state_dict() the whole dict"
            )
        same = value.device_mesh == param.device_mesh and value.placements == param.placements
        if not same or value.shape != param.shape:
            raise ValueError(
                f"{what}: a DTensor {list(value.shape)} of {value.placements} on {value.device_mesh}, its parameter is "
                f"{list(param.shape)} of {param.placements} on {param.device_mesh}: load through "
                "torch.distributed.checkpoint, which reshards"
            )
        return local(value)
    if not is_sharded(param):
        return value
    whole = value
    if key in MASK_KEYS and value.dtype == torch.uint8 and value.shape == (bits.packed_bytes(param.numel()),):
        whole = bits.unpack(value, param.numel()).view(param.shape)
    elif (
        key in NIBBLE_KEYS
        and _is_nibbles(saved, key)
        and value.shape == (nibbles.packed_bytes(param.numel()),) != param.shape
    ):
        whole = nibbles.unpack(value, param.numel()).view(param.shape)
    elif key in _CODES_OF and value.shape == (codec.scale_bytes(param.numel()),):
        whole = value.repeat_interleave(codec.BLOCK)[: param.numel()].view(param.shape)
    if whole.shape != param.shape:
        raise ValueError(f"{what}: expected shape {list(param.shape)}, got {value.dtype} {list(value.shape)}")
    shard = shard_of(param)
    assert shard is not None, "refused when the parameter joined"
    return whole[shard.slices]
