"""A checkpoint directory written tensor by tensor: as transformers writes it, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from torch import Tensor

from epi_kernels.finetune.checkpoint import DiskFull, write_directory
from epi_kernels.text import human_bytes

from .checkpoints import INDEX, SINGLE, Checkpoint
from .errors import IsolationError
from .tensor_files import TensorFileWriter, TensorInfo, aligned

# What a model's directory holds beside its weights: configs, tokenizer, templates, its own code.
COMPANIONS = (
    "config.json", "generation_config.json", "*token*.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.jinja",
    "chat_template*", "*processor_config.json", "*.py", "LICENSE*",
)  # fmt: skip


def require_free(out: Path, n_bytes: int) -> None:
    """Refuses an `out` that holds something, and a disk without room for so many bytes.

    Raises IsolationError, DiskFull.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise IsolationError(f"{out}: exists and is not an empty directory; choose another")
    parent = next(path for path in out.resolve().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < n_bytes:
        raise DiskFull(f"{out}: needs {human_bytes(n_bytes)}, its disk has {human_bytes(free)} left")


def plan_shards(
    tensors: Iterable[tuple[str, TensorInfo]], max_shard_bytes: int
) -> list[list[tuple[str, TensorInfo]]]:
    """In the order given, none larger than asked for unless by a single tensor."""
    shards: list[list[tuple[str, TensorInfo]]] = [[]]
    size = 0
    for name, info in tensors:
        if shards[-1] and size + info.n_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, info))
        size += info.n_bytes
    return shards


def write_checkpoint(
    out: Path,
    like: Checkpoint,
    produce: Callable[[str], Iterator[Tensor]],
    max_shard_bytes: int,
    notes: dict[str, object],
    notes_name: str,
) -> None:
    """Tensors named, shaped and typed as `like`'s, each from the slices of `produce(name)`; its other files are copied.

    `notes` go beside them as JSON. Raises DiskFull, IsolationError; nothing is at `out` then.
    """
    total = sum(info.n_bytes for info in like.tensors.values())
    require_free(out, total)
    shards = plan_shards(like.tensors.items(), max_shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]

    def write(folder: Path) -> None:
        for path in sorted(like.path.iterdir()) if like.path.is_dir() else ():
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in COMPANIONS):
                shutil.copyfile(path, folder / path.name)
        for file, shard in zip(names, shards, strict=True):
            ordered = aligned(shard)
            with TensorFileWriter(folder / file, ordered, {"format": "pt"}) as writer:
                for name, _ in ordered:
                    writer.write(produce(name))
        if len(shards) > 1:
            weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (folder / notes_name).write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")

    write_directory(out, write)
