"""The tensors of a model: a directory as transformers writes it, one safetensors file, or tensors in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Union

import torch
from torch import Tensor

from .errors import IsolationError
from .tensor_files import FLOAT_NAMES, FLOATS, TensorFile, TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Elements at a time; a multiple of 64, so that a slice owns whole bytes of a packed mask. Fusing three bfloat16
# checkpoints of 0.94e9 on two cores took 17 s and 31 MiB beside the imports; 1 << 18: 28 s, 51 MiB; 1 << 20: 21 to
# 37 s, 84 to 195 MiB.
SLICE = 1 << 17

# What the same weights mean depends on these too; shapes alone do not show them. And on the rotation of positions: `meaning`.
CONFIG_KEYS = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation",
    "tie_word_embeddings",
)  # fmt: skip
PARTS = ("text_config", "vision_config")  # of a model that sees, each with these keys of its own


class Tensors(Protocol):
    """Named tensors, whose bytes are read when asked for."""

    @property
    def label(self) -> str: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read_bytes(self, name: str, begin: int, end: int) -> Tensor:
        """uint8 [end - begin]"""
        ...


Source = Union[str, os.PathLike[str], Mapping[str, Tensor], "Tensors"]


class Checkpoint:
    """Weights of a local directory (one file or sharded), or of one safetensors file."""

    def __init__(self, path: str | os.PathLike[str]):
        """Raises IsolationError when there are no whole weights there."""
        self.path, self.label = Path(path), str(path)
        self._files: dict[str, TensorFile] = {}  # by tensor
        if not self.path.exists():
            raise IsolationError(f"{path}: no such file or directory")
        if not self.path.is_dir():
            one = TensorFile(self.path)
            self._files = dict.fromkeys(one.tensors, one)
        elif (self.path / SINGLE).is_file():  # transformers looks for it first, too
            one = TensorFile(self.path / SINGLE)
            self._files = dict.fromkeys(one.tensors, one)
        elif (self.path / INDEX).is_file():
            self._open_shards()
        else:
            raise IsolationError(f"{path}: holds no {SINGLE} and no {INDEX}")
        self.tensors = {name: file.tensors[name] for name, file in self._files.items()}
        if not self.tensors:
            raise IsolationError(f"{path}: holds no tensors")

    def _open_shards(self) -> None:
        path = self.path / INDEX
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise IsolationError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
        for shard in shards:
            if not isinstance(shard, str) or os.path.basename(shard) != shard:
                raise IsolationError(f"{path}: names a shard {shard!r} outside its directory")
        files = {shard: TensorFile(self.path / shard) for shard in shards}
        for name, shard in weight_map.items():
            if name not in files[shard].tensors:
                raise IsolationError(f"{path}: says that {name} is in {shard}, but it is not")
            self._files[name] = files[shard]

    @property
    def files(self) -> set[Path]:
        """That hold its tensors."""
        return {file.path for file in self._files.values()}

    def config(self) -> dict:
        """config.json, or nothing where there is none."""
        if not self.path.is_dir():
            return {}
        try:
            record = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise IsolationError(f"{self.path / 'config.json'}: cannot be read ({error})") from None
        return record if isinstance(record, dict) else {}

    def read_bytes(self, name: str, begin: int, end: int) -> Tensor:
        return self._files[name].read_bytes(name, begin, end)


def meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config says how its weights are to be read, by dotted names. Rotary settings go by transformers 5's
    names, `rope_parameters`, whichever version wrote them."""
    found = {key: config[key] for key in CONFIG_KEYS if key in config}
    rotary = config.get("rope_parameters")
    if rotary is None:
        rotary = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
        if "rope_scaling" in config:
            scaling = config["rope_scaling"] or {"rope_type": "default"}
            rotary |= {"rope_type" if key == "type" else key: value for key, value in scaling.items()}
    found |= {f"rope_parameters.{key}": value for key, value in _flat(rotary).items()}
    for part in PARTS:
        if isinstance(config.get(part), Mapping):
            found |= {f"{part}.{key}": value for key, value in meaning(config[part]).items()}
    return found


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Some architectures have rotary settings for each kind of layer."""
    found = {}
    for key, value in record.items():
        inner = _flat(value) if isinstance(value, Mapping) else {"": value}
        found |= {f"{key}.{name}".rstrip("."): one for name, one in inner.items()}
    return found


class MemoryTensors:
    """A state dict, or any mapping of names to tensors.

    ``aliases``: further names of a tensor (tied embeddings in a state dict) -> its first, which alone counts, as in a
    checkpoint's files and among a model's parameters.
    """

    def __init__(self, tensors: Mapping[str, Tensor], label: str = "the tensors given"):
        self.label, self._values = label, tensors
        self.aliases = _aliases(tensors)
        self.tensors = {
            name: TensorInfo(
                FLOAT_NAMES.get(one.dtype, str(one.dtype)), tuple(one.shape), one.numel() * one.element_size()
            )
            for name, one in tensors.items()
            if name not in self.aliases
        }

    def read_bytes(self, name: str, begin: int, end: int) -> Tensor:
        value = self._values[name].detach()
        width = value.element_size()
        return value.reshape(-1)[begin // width : end // width].cpu().view(torch.uint8)


def _aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> the first name of the same elements in memory."""
    first: dict[tuple, str] = {}
    found = {}
    for name, one in tensors.items():
        if one.numel():
            place = (one.device, one.data_ptr(), one.dtype, one.shape, one.stride())
            if first.setdefault(place, name) != name:
                found[name] = first[place]
    return found


def open_tensors(source: Source) -> Tensors:
    """Raises IsolationError when a path holds no whole weights, TypeError for what is neither path nor mapping."""
    if isinstance(source, Mapping):
        return MemoryTensors(source)
    if isinstance(source, str | os.PathLike):
        return Checkpoint(source)
    if not hasattr(source, "read_bytes"):
        raise TypeError(
            f"weights are a checkpoint's path or a mapping of names to tensors (model.state_dict()), not {type(source).__name__}"
        )
    return source


def read(source: Tensors, name: str, start: int, stop: int) -> Tensor:
    """Elements start .. stop - 1 of a floating-point tensor, row-major, flat, in its own dtype, on the CPU."""
    dtype = FLOATS[source.tensors[name].dtype]
    return source.read_bytes(name, start * dtype.itemsize, stop * dtype.itemsize).view(dtype)


def slices(numel: int) -> Iterator[tuple[int, int]]:
    for start in range(0, numel, SLICE):
        yield start, min(start + SLICE, numel)


def floating(source: Tensors) -> dict[str, TensorInfo]:
    """What counts as parameters. Raises IsolationError for dtypes that stand for quantised weights."""
    for name, info in source.tensors.items():
        if info.dtype.startswith(("F", "torch.float")) and not info.floating:
            raise IsolationError(
                f"{source.label}: {name} is {info.dtype}; quantised weights cannot be compared: use {', '.join(FLOATS)}"
            )
    return {name: info for name, info in source.tensors.items() if info.floating}


def require_same_shapes(
    what: str, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], of: str
) -> None:
    """Raises IsolationError unless names and shapes agree."""
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is not in {of}" for name in found if name not in wanted]
    wrong += [
        f"{name} is {list(found[name])}, in {of} {list(wanted[name])}"
        for name in wanted
        if name in found and tuple(found[name]) != tuple(wanted[name])
    ]
    if wrong:
        more = f" ({len(wrong)} differences)" if len(wrong) > 3 else ""
        raise IsolationError(f"{what}: of another architecture than {of}: {'; '.join(wrong[:3])}{more}")


def require_same_architecture(base: Tensors, others: Sequence[Tensors]) -> None:
    """Raises IsolationError unless all have base's names, shapes and kinds of tensors, and configs that agree."""
    shapes = {name: info.shape for name, info in base.tensors.items()}
    parameters = floating(base)
    for other in others:
        require_same_shapes(
            other.label, {name: info.shape for name, info in other.tensors.items()}, shapes, base.label
        )
        for name, info in other.tensors.items():
            if info.dtype != base.tensors[name].dtype and not (info.floating and name in parameters):
                raise IsolationError(
                    f"{other.label}: {name} is {info.dtype}, in {base.label} {base.tensors[name].dtype}"
                )
        if isinstance(base, Checkpoint) and isinstance(other, Checkpoint):
            ours, theirs = meaning(base.config()), meaning(other.config())
            for key in ours:
                if key in theirs and ours[key] != theirs[key]:
                    raise IsolationError(
                        f"{other.label}: of another architecture than {base.label}: its config's {key} is "
                        f"{theirs[key]!r}, there {ours[key]!r}"
                    )
