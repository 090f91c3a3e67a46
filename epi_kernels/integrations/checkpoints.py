"""Checkpoints of a model and its optimizer through ``torch.distributed.checkpoint``, on one rank or many.

``dcp.load`` writes into the tensors that it is given: a file cut off in the middle leaves half of them changed, and a
key that the optimizer has not made yet (a persistent mask) is dropped in silence. These two functions load into
copies, ask the checkpoint what is in it, and write beside the old checkpoint until the new one is whole.

    save_checkpoint("run/last", model, optimizer)  # every rank
    load_checkpoint("run/last", model, optimizer)  # on any number of ranks, sharded or not
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from epi_kernels.distributed.world import first_rank
from epi_kernels.optim import MaskedEMAAdamW

MODEL, OPTIMIZER = "model", "optimizer"


def save_checkpoint(path: str | os.PathLike[str], model: nn.Module, optimizer: MaskedEMAAdamW) -> None:
    """Writes model and optimizer to the directory ``path``; what was there stays until the new one is whole.

    A call of all ranks; ``path`` lies on a file system that all of them see.
    """
    target = Path(path)
    partial, old = target.with_name(target.name + ".partial"), target.with_name(target.name + ".old")
    if first_rank():
        shutil.rmtree(partial, ignore_errors=True)
    _wait()
    state = {MODEL: get_model_state_dict(model), OPTIMIZER: get_optimizer_state_dict(model, optimizer)}
    save(state, checkpoint_id=partial)
    if first_rank():
        for file in (*sorted(partial.iterdir()), partial):
            _sync(file)
        # a directory cannot be replaced in one move: load_checkpoint looks for the old one too
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
        os.rename(partial, target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    _wait()


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module, optimizer: MaskedEMAAdamW) -> None:
    """Loads what ``save_checkpoint`` wrote, whole or not at all; copies of the state exist meanwhile.

    A call of all ranks.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is of another model, or does not fit the optimizer; nothing has changed.
        CheckpointException: (of torch, on every rank) a file is damaged; nothing has changed.
    """
    folder = Path(path)
    if not folder.exists():  # a crash between the two renames of a save
        folder = folder.with_name(folder.name + ".old")
    if not (folder / ".metadata").exists():
        raise FileNotFoundError(f"{path}: no checkpoint of torch.distributed.checkpoint is there")
    metadata = FileSystemReader(folder).read_metadata()
    template = {MODEL: get_model_state_dict(model), OPTIMIZER: get_optimizer_state_dict(model, optimizer)}
    _check_names(template, metadata, folder)
    state = _copies(template)
    _fit(state[OPTIMIZER]["state"], metadata)
    load(state, checkpoint_id=folder)
    optimizer.load_state_dict(state[OPTIMIZER])  # refused by all ranks or by none
    set_model_state_dict(model, state[MODEL])


def _stored(metadata: Metadata) -> dict[tuple, Any]:
    """What the checkpoint holds, by its place in the dict that was saved."""
    paths = metadata.planner_data or {}
    return {
        tuple(paths[name]): stored for name, stored in metadata.state_dict_metadata.items() if name in paths
    }


def _check_names(template: dict[str, Any], metadata: Metadata, folder: Path) -> None:
    stored = _stored(metadata)
    wanted, found = set(template[MODEL]), {path[1] for path in stored if path[0] == MODEL}
    if wanted != found:
        lacking, strange = sorted(wanted - found), sorted(found - wanted)
        raise ValueError(
            f"{folder} is of another model: it lacks {lacking[:3]} ({len(lacking)}) and has {strange[:3]} ({len(strange)}) "
            "that this one lacks"
        )
    for name, value in template[MODEL].items():
        size = getattr(stored[MODEL, name], "size", None)
        if isinstance(value, Tensor) and size != value.shape:
            raise ValueError(
                f"{folder} is of another model: {name} has shape {size}, here {list(value.shape)}"
            )


def _fit(states: dict[str, dict[str, Any]], metadata: Metadata) -> None:
    """What is saved in another form (packed masks beside sharded parameters, another dtype, keys that are not made yet)
    is read as it is, whole; what was not saved is left out."""
    saved: dict[str, dict[str, Any]] = {name: {} for name in states}
    for path, stored in _stored(metadata).items():
        if path[:2] == (OPTIMIZER, "state") and len(path) == 4 and path[2] in states:
            mine = states[path[2]].get(path[3])
            if isinstance(stored, TensorStorageMetadata) and not (
                isinstance(mine, Tensor)
                and mine.shape == stored.size
                and mine.dtype == stored.properties.dtype
            ):
                mine = torch.empty(stored.size, dtype=stored.properties.dtype)
            saved[path[2]][path[3]] = mine
    states.clear()
    states.update({name: state for name, state in saved.items() if state})


def _copies(value: Any) -> Any:
    """Of every tensor in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copies(one) for key, one in value.items()}
    return [_copies(one) for one in value] if isinstance(value, list) else value


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
