"""safetensors files read and written slice by slice, so that memory never grows with the file.

Reading is by plain reads into small buffers, not by mapping: pages of a mapped checkpoint count as memory of the process.
"""

from __future__ import annotations

import json
import math
import struct
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import IsolationError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}


class TensorInfo(NamedTuple):
    """dtype by its safetensors name; n_bytes of the whole tensor."""

    dtype: str
    shape: tuple[int, ...]
    n_bytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        return self.dtype in FLOATS


class TensorFile:
    """A safetensors file, its header checked; the data stay on the disk until they are read."""

    def __init__(self, path: Path):
        """Raises IsolationError when it is no whole safetensors file."""
        from safetensors import SafetensorError, safe_open

        self.path = path
        if path.is_dir():
            raise IsolationError(f"{path}: is a directory, not a safetensors file")
        try:
            with safe_open(path, "pt"):  # checks offsets, sizes and the file's length
                pass
            self._file = open(path, "rb", buffering=0)
            weakref.finalize(self, self._file.close)
        except FileNotFoundError:
            raise IsolationError(f"{path}: no such file") from None
        except (OSError, SafetensorError) as error:
            raise IsolationError(f"{path}: not a whole safetensors file ({error})") from None
        (length,) = struct.unpack("<Q", self._file.read(8))
        header = json.loads(self._file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self._begin: dict[str, int] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, record in header.items():
            begin, end = record["data_offsets"]
            self._begin[name] = 8 + length + begin
            self.tensors[name] = TensorInfo(record["dtype"], tuple(record["shape"]), end - begin)

    def read_bytes(self, name: str, begin: int, end: int) -> Tensor:
        """uint8 [end - begin] of one tensor's bytes."""
        buffer = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
        view = buffer.numpy().data
        self._file.seek(self._begin[name] + begin)
        while view:
            count = self._file.readinto(view)
            if not count:
                raise IsolationError(f"{self.path}: cut off while it was read")
            view = view[count:]
        return buffer


class TensorFileWriter:
    """Writes a safetensors file in the order of its tensors; a context manager, which checks that all of it came."""

    def __init__(self, path: Path, tensors: Sequence[tuple[str, TensorInfo]], metadata: Mapping[str, str]):
        """Wide dtypes come first (`aligned`), so that readers may map what they read."""
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        offset = 0
        for name, info in tensors:
            end = offset + info.n_bytes
            header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
        self._left = offset
        self._file = open(path, "wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, slices: Iterable[Tensor]) -> None:
        """The next elements, flat and in order."""
        for piece in slices:
            raw = piece.contiguous().view(torch.uint8)
            self._left -= raw.numel()
            self._file.write(raw.numpy().data)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._file.close()
        if kind is None and self._left != 0:
            raise AssertionError(f"{self._left} bytes were not written")


def aligned(tensors: Iterable[tuple[str, TensorInfo]]) -> list[tuple[str, TensorInfo]]:
    """Wider elements first: each tensor then begins at a multiple of its element's size."""
    return sorted(tensors, key=lambda item: -(item[1].n_bytes // max(1, item[1].numel)))
