"""Masks and importance in a safetensors file: for another optimizer, or another program.

`exchange_file` says what is where.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epi_kernels.distributed import shards
from epi_kernels.distributed.world import by_all, first_rank, on_first_rank
from epi_kernels.files import whole
from epi_kernels.optim import ranks, stepping
from epi_kernels.optim.arguments import INT8
from epi_kernels.optim.carry import Carried, match_source
from epi_kernels.optim.compact import check_granularity, whole_masks
from epi_kernels.optim.entries import Entry
from epi_kernels.optim.exchange_file import FORMAT, VERSION, SavedParameter, read
from epi_kernels.optim.masked_ema_adamw import MaskedEMAAdamW
from epi_kernels.optim.masks import MASK_KEYS, load_mask, zero_mask
from epi_kernels.optim.moments import SCALE_OF
from epi_kernels.optim.names import bare_name
from epi_kernels.optim.wrapped import unwrapped
from epi_kernels.reference import bits

STATISTIC = "exponential moving average of the squared gradient; divide by 1 - beta^step for its mean"


def save_isolation(optimizer: MaskedEMAAdamW, path: str | os.PathLike[str]) -> None:
    """Writes the importance and the masks of an optimizer's parameters, whole or not at all.

    `load_isolation` reads it, and `epi-kernels finetune --protect`. `exchange_file` says what is where. Of sharded
    parameters it is a call of all ranks, of which the first writes; of others, one of one rank.

    Raises:
        TypeError: it is no MaskedEMAAdamW, nor a library's wrapper of one.
        ValueError: parameters have no names, or names that a file cannot hold, or there is no state yet, or importance
            is not a number; of sharded ones, on every rank.
        OSError: the file cannot be written; what was at ``path`` is still there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    optimizer = unwrapped(optimizer, "save_isolation takes")
    sharded = any(shards.is_sharded(param) for group in optimizer.param_groups for param in group["params"])

    def prepare() -> tuple[dict[str, Entry], list[Carried | None]]:
        named = _named_entries(optimizer)
        found = match_source(optimizer, [entry.param for entry in named.values()], list(named))
        for name, one in zip(named, found, strict=True):
            if one is not None and bool(one.importance.isnan().any()):
                raise ValueError(
                    f"the importance of {name} has values that are not a number, as after a gradient that was none, and so have "
                    "its weights: save what there was before that step"
                )
        return named, found

    entries, carried = by_all(prepare) if sharded else prepare()
    writes = not sharded or first_rank()
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, dict[str, Any]] = {}
    for (name, entry), taken in zip(entries.items(), carried, strict=True):
        parameters[name] = {"shape": list(entry.param.shape), "step": None}
        if taken is not None:
            group = entry.group
            beta = group["importance_beta"] if taken.key == "importance" else group["betas"][1]
            parameters[name] |= {"step": int(taken.step), "beta": float(beta)}
            scale = taken.source.get(SCALE_OF[taken.key])
            # 8-bit codes: 4 bits of mantissa, exponents within bf16's
            eight = scale is not None and scale.dtype == INT8
            values = taken.importance.bfloat16() if eight else taken.importance.contiguous()
            tensors[name] = _whole(values, entry.param)
        state = whole_masks(optimizer.state.get(entry.param, {}), entry.param)
        for key in MASK_KEYS if shards.is_sharded(entry.param) else ():
            mask = bits.unpack(state.get(key, zero_mask(entry.param)), entry.weight.numel())
            state = state | {key: bits.pack(_whole(mask.view(entry.weight.shape), entry.param))}
        masks = [key for key in MASK_KEYS if key in state]
        parameters[name]["masks"] = masks
        tensors.update({f"{key}/{name}": state[key] for key in masks})
        if not writes:  # the first rank's
            tensors.clear()
    config = optimizer._config
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "statistic": STATISTIC,
        "isolation_step": str(optimizer._isolation_step),
        "isolation_ratio": repr(config.isolation_ratio),
        "normalization": config.normalization,
        "scope": config.scope,
        "parameters": json.dumps(parameters),
    }

    def write() -> None:
        try:
            with whole(Path(path)) as partial:
                save_file(tensors, partial, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error

    on_first_rank(write) if sharded else write()


@torch.no_grad()
def load_isolation(
    optimizer: MaskedEMAAdamW, path: str | os.PathLike[str], *, masks: bool = True, importance: bool = True
) -> None:
    """Takes over what `save_isolation` wrote of the same parameters, matched by name, all or nothing.

    The importance goes in as ``carry_importance`` takes another optimizer's: a new stage begins, T at 0 and
    ``exp_avg`` zero. The masks go in as they are, in place of those that are there: isolated from the next step on, the
    persistent ones for good and the others until the next refresh. Without ``importance`` the run goes on as it was.
    Corrections of weights (``master_weight_bits``) belong to the weights: they are not in the file, and stay. Of ranks
    that select together it is a call of all.

    Raises:
        TypeError: it is no MaskedEMAAdamW, nor a library's wrapper of one.
        ValueError: the file is damaged, no file of ours or of another version, or is another model's; parameters have no
            names; nothing is asked for; or another rank refuses. Nothing has changed then.
        OSError: there is no such file.
    """
    optimizer = unwrapped(optimizer, "load_isolation takes")
    if not masks and not importance:
        raise ValueError("load_isolation with masks=False and importance=False loads nothing")
    entries = _named_entries(optimizer)
    stepping.join_ranks(optimizer, [entry.param for entry in entries.values()])

    def read_all() -> tuple[dict[str, SavedParameter], dict[str, dict[str, Tensor]]]:
        found = read(path).parameters
        _check_same_model(path, entries, found)
        return found, {
            name: {
                key: load_mask(mask, entry.param, f"{path}, {key} of {name}")
                for key, mask in found[name].masks.items()
            }
            for name, entry in entries.items()
            if masks
        }

    def read_checked() -> tuple[dict[str, SavedParameter], dict[str, dict[str, Tensor]]]:
        found, packed = read_all()
        for name, kinds in packed.items():
            if "persistent_mask" in kinds:
                mask, param = kinds["persistent_mask"], entries[name].param
                check_granularity(mask, param, optimizer._config, f"{path}, {name}")
        return found, packed

    saved, packed = ranks.all_or_none(read_checked, optimizer._world, optimizer._device())
    if importance:
        optimizer.carry_importance(_as_state_dict(saved))
    for name, found in packed.items():
        _install(optimizer, entries[name].param, found)


def _named_entries(optimizer: MaskedEMAAdamW) -> dict[str, Entry]:
    """The parameters by the names that a file has."""
    if not all("param_names" in group for group in optimizer.param_groups):
        raise ValueError(
            "a file knows parameters by name, and this optimizer's have none: make it with (name, tensor) pairs, "
            "e.g. MaskedEMAAdamW(model.named_parameters())"
        )
    entries: dict[str, Entry] = {}
    for entry in optimizer._parameters():
        name = bare_name(entry.name)
        if (
            name in entries
            or name == "__metadata__"
            or name.startswith(tuple(f"{key}/" for key in MASK_KEYS))
        ):
            raise ValueError(
                f"a parameter named {entry.name!r} cannot be told apart in a file: give it another name"
            )
        entries[name] = entry
    return entries


def _whole(piece: Tensor, param: Tensor) -> Tensor:
    """Of this rank's part, all; a call of all ranks where ``param`` is sharded."""
    wrapped = shards.wrap(piece, param)
    return wrapped.full_tensor() if shards.is_sharded(wrapped) else piece


def _check_same_model(
    path: str | os.PathLike[str], entries: dict[str, Entry], saved: dict[str, SavedParameter]
) -> None:
    wrong = [f"{name} is not in the file" for name in entries if name not in saved]
    wrong += [f"{name} is not in the optimizer" for name in saved if name not in entries]
    wrong += [
        f"{name} is {list(saved[name].shape)} in the file, {list(entry.param.shape)} in the optimizer"
        for name, entry in entries.items()
        if name in saved and saved[name].shape != entry.param.shape
    ]
    if wrong:
        more = f" ({len(wrong)} differences)" if len(wrong) > 5 else ""
        raise ValueError(f"{path}: of another model: {'; '.join(wrong[:5])}{more}")


def _as_state_dict(saved: dict[str, SavedParameter]) -> dict[str, Any]:
    """What ``carry_importance`` takes: a source whose importance is its exp_avg_sq."""
    state = {
        index: {"step": one.step, "exp_avg_sq": one.importance}
        for index, one in enumerate(saved.values())
        if one.importance is not None
    }
    return {"state": state, "param_groups": [{"params": list(range(len(saved))), "param_names": list(saved)}]}


def _install(optimizer: MaskedEMAAdamW, param: Tensor, packed: dict[str, Tensor]) -> None:
    """The file's masks of one parameter in place of its own."""
    if not packed and not any(key in optimizer.state.get(param, {}) for key in MASK_KEYS):
        return
    for key in reversed(MASK_KEYS):  # the persistent one first: the other one is laid over it
        mask = torch.zeros(param.shape, dtype=torch.bool, device=param.device)
        if key in packed:
            mask = bits.unpack(packed[key], param.numel()).view(param.shape)
        optimizer.set_isolation_mask(param, mask, persistent=key == "persistent_mask")
