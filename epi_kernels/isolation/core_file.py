"""A core region: which elements of a model it holds, one bit each.

isolation_mask/NAME   uint8 [ceil(n / 8)]: element i, row-major, is bit i % 8 of byte i // 8; bits past the last are 0

as in the files of `epi_kernels.save_isolation`, which are read too (a mask that is not there is empty). The
metadata say what it is (`format`, `version`) and of which model: `parameters` is a JSON object, name -> {"shape":
[...]}.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from epi_kernels.optim import exchange
from epi_kernels.reference.bits import pack, packed_bytes, unpack

from .checkpoints import SLICE, require_same_shapes
from .errors import IsolationError
from .tensor_files import TensorFile

FORMAT = "epi-kernels core region"
VERSION = "1"
KEY = "isolation_mask/"


class Core(Protocol):
    @property
    def label(self) -> str: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def packed(self, name: str, begin: int, end: int) -> Tensor:
        """Bytes begin .. end - 1 of a packed mask, uint8."""
        ...


CoreSource = str | os.PathLike[str] | Core


class MemoryCore:
    """A core region whose packed masks lie in memory."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], masks: Mapping[str, Tensor], label: str = "a core"
    ):
        """`masks`: uint8 [ceil(n / 8)] by name; none for an empty one."""
        self.label, self.shapes, self.masks = label, dict(shapes), dict(masks)

    @classmethod
    def from_bools(cls, masks: Mapping[str, Tensor], label: str = "a core") -> MemoryCore:
        """From bool tensors of the parameters' shapes."""
        shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
        return cls(shapes, {name: pack(mask.cpu()) for name, mask in masks.items()}, label)

    def packed(self, name: str, begin: int, end: int) -> Tensor:
        if name not in self.masks:
            return torch.zeros(end - begin, dtype=torch.uint8, device="cpu")
        return self.masks[name][begin:end]


class CoreFile:
    """A file that `save_core` or `epi_kernels.save_isolation` wrote; its masks are read when asked for."""

    def __init__(self, path: str | os.PathLike[str]):
        """Raises IsolationError when it is another file, of another version, or damaged."""
        self.path, self.label = Path(path), str(path)
        self._file = TensorFile(self.path)
        self.metadata = self._file.metadata
        known = {FORMAT: VERSION, exchange.FORMAT: exchange.VERSION}
        kind, version = self.metadata.get("format"), self.metadata.get("version")
        if kind not in known:
            raise IsolationError(
                f"{path}: not a core region (written by `epi-kernels isolate core` or epi_kernels.save_isolation)"
            )
        if version != known[kind]:
            raise IsolationError(f"{path}: has version {version!r}; this release reads {known[kind]!r}")
        try:
            parameters = json.loads(self.metadata["parameters"])
            self.shapes = {name: tuple(map(int, one["shape"])) for name, one in parameters.items()}
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise IsolationError(f"{path}: damaged ({type(error).__name__}: {error})") from None
        for name, one in parameters.items():  # earlier releases do not say which masks there are
            lost = [key for key in one.get("masks", ()) if f"{key}/{name}" not in self._file.tensors]
            if lost:
                raise IsolationError(f"{path}: damaged (the {lost[0]} of {name} is not in it)")
        for key, info in self._file.tensors.items():
            if key.startswith(KEY):
                self._check(key.removeprefix(KEY), info)

    def _check(self, name: str, info) -> None:
        if name not in self.shapes:
            raise IsolationError(f"{self.path}: damaged (a mask of {name}, which has no shape)")
        numel = math.prod(self.shapes[name])
        size = packed_bytes(numel)
        if info.dtype != "U8" or info.shape != (size,):
            raise IsolationError(
                f"{self.path}: damaged (the mask of {name} is {info.dtype} {list(info.shape)}, not U8 [{size}])"
            )
        spare = -numel % 8
        if spare and int(self._file.read_bytes(KEY + name, size - 1, size)[0]) >> (8 - spare):
            raise IsolationError(f"{self.path}: damaged (padding bits of the mask of {name} are set)")

    def packed(self, name: str, begin: int, end: int) -> Tensor:
        if KEY + name not in self._file.tensors:
            return torch.zeros(end - begin, dtype=torch.uint8, device="cpu")
        return self._file.read_bytes(KEY + name, begin, end)


def open_core(source: CoreSource) -> Core:
    return CoreFile(source) if isinstance(source, str | os.PathLike) else source


def require_same_model(cores: Sequence[Core]) -> None:
    """Raises IsolationError unless all have the names and shapes of the first."""
    for other in cores[1:]:
        require_same_shapes(other.label, other.shapes, cores[0].shapes, cores[0].label)


def byte_slices(core: Core) -> Iterator[tuple[str, int, int]]:
    """(name, begin, end) of pieces that cover a core's packed masks."""
    for name, shape in core.shapes.items():
        size = packed_bytes(math.prod(shape))
        for begin in range(0, size, SLICE):
            yield name, begin, min(begin + SLICE, size)


def read_mask(core: Core, name: str, start: int, stop: int) -> Tensor:
    """bool [stop - start] of elements of one tensor; `start` is a multiple of 8."""
    return unpack(core.packed(name, start // 8, packed_bytes(stop)), stop - start)


def union_mask(cores: Sequence[Core], name: str) -> Tensor:
    """bool, of the parameter's shape: what any of the cores holds."""
    shape = cores[0].shapes[name]
    size = packed_bytes(math.prod(shape))
    union = torch.zeros(size, dtype=torch.uint8, device="cpu")
    for core in cores:
        union |= core.packed(name, 0, size)
    return unpack(union, math.prod(shape)).view(shape)
