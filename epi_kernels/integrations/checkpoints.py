"""Checkpoints of a model and its optimizer through ``torch.distributed.checkpoint``, on one rank or many.

``load`` of that package writes into the tensors that it is given: a file cut off in the middle leaves half of them
changed, and what the optimizer does not list (state of a parameter frozen since) is dropped in silence. These two
functions load what the checkpoint holds into tensors of their own, by the parameters' names, and write beside the old
checkpoint until the new one is whole.

    save_checkpoint("run/last", model, optimizer)  # every rank
    load_checkpoint("run/last", model, optimizer)  # on any number of ranks, sharded or not
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from epi_kernels.distributed.shards import is_sharded, local, wrap
from epi_kernels.distributed.world import by_all, first_rank, on_first_rank
from epi_kernels.files import sync
from epi_kernels.integrations.groups import parameter_names
from epi_kernels.optim import MaskedEMAAdamW, group_text, ranks, saving
from epi_kernels.optim.arguments import IsolationConfig
from epi_kernels.optim.group_text import VERSION_KEY
from epi_kernels.optim.home import home
from epi_kernels.optim.masks import MASK_KEYS
from epi_kernels.optim.wrapped import unwrapped

MODEL, OPTIMIZER, STATE, GROUPS = "model", "optimizer", "state", "param_groups"
SAVES = "saves"  # rank -> [16] uint8, which save its file is of: torch does not see that files of several are mixed
MARK = ".metadata"  # written last, by torch


def save_checkpoint(path: str | os.PathLike[str], model: nn.Module, optimizer: MaskedEMAAdamW) -> None:
    """Writes model and optimizer to the directory ``path``; the checkpoint there is replaced when the new one is whole.

    A call of all ranks; ``path`` lies on a file system that all of them see.

    Raises:
        TypeError: ``optimizer`` is no MaskedEMAAdamW, nor a library's wrapper of one.
        ValueError: a parameter of the optimizer is not the model's, ``path`` is there and no checkpoint, or the ranks
            differ in settings, options, masks or steps (one went on without a step that the others took), which
            DistributedDataParallel does not notice.
        OSError: (or what torch makes of it, on every rank) it cannot be written; the checkpoint before it is still there.
    """
    optimizer = unwrapped(optimizer, "save_checkpoint takes")
    target = Path(path).resolve()
    partial, old = target.with_name(target.name + ".partial"), target.with_name(target.name + ".old")
    state = by_all(
        lambda: {
            MODEL: get_model_state_dict(model),
            OPTIMIZER: _by_name(optimizer, _names(model, optimizer)),
        }
    )

    ranks.compare(list(optimizer._parameters()), optimizer.state, optimizer._config)

    def prepare() -> bytes:
        if target.exists() and not (target / MARK).exists() and (target.is_file() or any(target.iterdir())):
            raise ValueError(f"{path} is there and is no checkpoint: it would be replaced")
        shutil.rmtree(partial, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        return os.urandom(16)

    def put_in_place() -> None:
        for file in (*sorted(partial.iterdir()), partial):
            sync(file)
        # a directory cannot be replaced in one move: load_checkpoint looks for the old one too
        if target.exists():
            if old.exists():
                shutil.rmtree(old)
            os.rename(target, old)
        os.rename(partial, target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)

    number = torch.frombuffer(bytearray(on_first_rank(prepare)), dtype=torch.uint8)
    state[SAVES] = {str(dist.get_rank() if dist.is_initialized() else 0): number}
    save(state, checkpoint_id=partial)
    on_first_rank(put_in_place)


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module, optimizer: MaskedEMAAdamW) -> None:
    """Loads what ``save_checkpoint`` wrote, whole or not at all; the new state and the old one exist side by side meanwhile,
    the new weights of a plain model in host memory.

    Parameters are matched by their names in the model; how they are grouped must be the same, in any order. A call of
    all ranks.

    Raises:
        TypeError: ``optimizer`` is no MaskedEMAAdamW, nor a library's wrapper of one.
        FileNotFoundError: there is no checkpoint.
        ValueError: it is of another model or of other groups, does not fit the optimizer or has files of several saves, or
            the ranks' settings differ; nothing has changed.
        CheckpointException: (of torch, on every rank) a file is damaged; nothing has changed. Where one rank alone
            refuses, the others hear a ValueError with its words.
    """
    optimizer = unwrapped(optimizer, "load_checkpoint takes")
    folder, names, template = by_all(lambda: _template(Path(path).resolve(), model, optimizer))
    ranks.compare_settings(list(optimizer._parameters()), optimizer._config)
    load(template, checkpoint_id=folder)
    by_all(lambda: _check_one_save(template.get(SAVES, {}), folder))
    states, groups = template[OPTIMIZER][STATE], template[OPTIMIZER][GROUPS]
    found = by_all(lambda: _in_our_order(states, groups, optimizer, names, folder))
    with torch.no_grad():
        saving.load(optimizer, found, spent=True)  # refused by all ranks or by none
    set_model_state_dict(model, template[MODEL])


def _template(
    folder: Path, model: nn.Module, optimizer: MaskedEMAAdamW
) -> tuple[Path, dict[Tensor, str], dict[str, Any]]:
    """Where the checkpoint is, the parameters' names, and room for what it holds."""
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():  # a crash between the two renames of a save
        folder = old
    if not (folder / MARK).exists():
        raise FileNotFoundError(f"{folder}: no checkpoint of torch.distributed.checkpoint is there")
    try:
        stored = _stored(FileSystemReader(folder).read_metadata())
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{folder / MARK}: damaged ({type(error).__name__}: {error})") from None
    names, weights = _names(model, optimizer), get_model_state_dict(model)
    _check_model(weights, stored, folder)
    template: dict[str, Any] = {MODEL: _room_for(weights), OPTIMIZER: {STATE: {}}}
    numbers = [(path[1], one.size) for path, one in stored.items() if path[0] == SAVES]
    if numbers and first_rank():  # it alone opens the files of all ranks
        template[SAVES] = {rank: torch.empty(size, dtype=torch.uint8) for rank, size in numbers}
    params = {name: param for param, name in names.items()}
    _lay_out(template[OPTIMIZER], stored, params, optimizer._config, folder)
    return folder, names, template


def _names(model: nn.Module, optimizer: MaskedEMAAdamW) -> dict[Tensor, str]:
    """Of the optimizer's parameters, in the model."""
    if optimizer._world is not None and optimizer._world.group is not None:
        raise ValueError(
            "save_checkpoint and load_checkpoint take models that all ranks hold: with set_process_group save each stage's "
            "state_dict() by itself"
        )
    known = parameter_names(model)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    strangers = sum(param not in known for param in params)
    if strangers:
        raise ValueError(f"{strangers} parameters of the optimizer are not the model's")
    return {param: known[param] for param in params}


def _by_name(optimizer: MaskedEMAAdamW, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """The optimizer's state dict with names for numbers, and plain numbers in its groups."""
    saved, ordered = optimizer.state_dict(), list(names.values())
    groups = [
        {key: _plain(value) for key, value in group.items()}
        | {"params": [ordered[number] for number in group["params"]]}
        for group in saved["param_groups"]
    ]
    return {STATE: {ordered[number]: state for number, state in saved["state"].items()}, GROUPS: groups}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _stored(metadata: Metadata) -> dict[tuple, Any]:
    """What the checkpoint holds, by its place in the dict that was saved."""
    paths = metadata.planner_data or {}
    return {tuple(paths[name]): one for name, one in metadata.state_dict_metadata.items() if name in paths}


def _check_model(weights: Mapping[str, Any], stored: Mapping[tuple, Any], folder: Path) -> None:
    _check_same(weights, {path[1] for path in stored if path[0] == MODEL}, folder)
    for name, value in weights.items():
        size = getattr(stored.get((MODEL, name)), "size", None)
        if isinstance(value, Tensor) and size != value.shape:
            raise ValueError(
                f"{folder} is of another model: {name} has shape {size}, here {list(value.shape)}"
            )


def _check_one_save(numbers: Mapping[str, Tensor], folder: Path) -> None:
    """Earlier releases wrote no numbers."""
    found = {bytes(number.tolist()): rank for rank, number in numbers.items()}
    if len(found) > 1:
        raise ValueError(
            f"{folder}: files of {len(found)} saves are mixed in it (those of ranks {', '.join(sorted(found.values()))} are not "
            "of one): copy all of its files anew from where it was saved"
        )


def _check_same(wanted: Iterable[str], found: Iterable[str], folder: Path) -> None:
    lacking, strange = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if lacking or strange:
        raise ValueError(
            f"{folder} is of another model: it lacks {lacking[:3]} ({len(lacking)}) and has {strange[:3]} ({len(strange)}) "
            "that this one lacks"
        )


def _lay_out(
    optimizer: dict[str, Any],
    stored: Mapping[tuple, Any],
    params: Mapping[str, Tensor],
    config: IsolationConfig,
    folder: Path,
) -> None:
    """Room for what the checkpoint holds of the optimizer: this rank's part of what is shaped like its parameter, all
    of the rest (packed masks beside parameters that are sharded here)."""
    groups: dict[int, dict[str, Any]] = {}
    for path, one in stored.items():
        if path[:2] == (OPTIMIZER, GROUPS) and len(path) == 4:
            tensor = isinstance(one, TensorStorageMetadata)
            value = torch.empty(one.size, dtype=one.properties.dtype) if tensor else None
            groups.setdefault(path[2], {})[path[3]] = value
        if path[:2] != (OPTIMIZER, STATE) or len(path) != 4:
            continue
        name, key = path[2:]
        if name not in params:
            raise ValueError(f"{folder} holds state of {name}, which this optimizer lacks")
        param, value = params[name], None
        if isinstance(one, TensorStorageMetadata):
            # a mask that one process packed has the shape of a parameter [1] as well
            packed = key in MASK_KEYS and one.properties.dtype == torch.uint8
            alike = key != "step" and not packed and one.size == param.shape
            size = local(param).shape if alike else one.size
            value = torch.empty(size, dtype=one.properties.dtype, device=home(param, config))
            value = wrap(value, param) if alike else value
        optimizer[STATE].setdefault(name, {})[key] = value
    optimizer[GROUPS] = [groups[number] for number in sorted(groups)]
    if not groups or not all("params" in group for group in groups.values()):
        raise ValueError(f"{folder} holds no optimizer that save_checkpoint wrote")


def _in_our_order(
    states: Mapping[str, Any],
    saved_groups: list[dict[str, Any]],
    optimizer: MaskedEMAAdamW,
    names: Mapping[Tensor, str],
    folder: Path,
) -> dict[str, Any]:
    """A state dict for ``optimizer``: its parameters' numbers and its groups' order."""
    group_of = {name: number for number, group in enumerate(saved_groups) for name in group["params"]}
    _check_same(names.values(), group_of, folder)
    numbers = {name: number for number, name in enumerate(names.values())}
    groups = []
    for ours in optimizer.param_groups:
        own = [names[param] for param in ours["params"]]
        of = {group_of[name] for name in own}
        if len(of) > 1 or len(saved_groups) != len(optimizer.param_groups):
            raise ValueError(f"{folder}: the optimizer's parameters were grouped otherwise")
        saved = saved_groups[of.pop()] if of else {}
        group = {key: value for key, value in saved.items() if key != "param_names"}
        if VERSION_KEY in group:  # the masks beside it are in the saved group's order, and in the states
            group[VERSION_KEY] = group_text.read(saved).version
        if isinstance(ours["lr"], Tensor) and "lr" in group:
            group["lr"] = torch.full_like(ours["lr"], group["lr"])
        groups.append(group | {"params": [numbers[name] for name in own]})
    return {"state": {numbers[name]: state for name, state in states.items()}, "param_groups": groups}


def _room_for(value: Any) -> Any:
    """For every tensor in nested dicts and lists one of its shape: on the host, for a device may not hold a model twice."""
    if isinstance(value, Tensor):
        whole = not is_sharded(value)
        return torch.empty(value.shape, dtype=value.dtype, device="cpu") if whole else value.detach().clone()
    if isinstance(value, dict):
        return {key: _room_for(one) for key, one in value.items()}
    return [_room_for(one) for one in value] if isinstance(value, list) else value
