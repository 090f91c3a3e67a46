"""Importance of weights for old data: the mean over batches of the squared batch gradient, float32, streamed to disk.

A batch gradient's square is not a per-sample Fisher: gradients of the samples of a batch are added before they are
squared, so samples that pull in opposite directions cancel. It is what an optimizer with batches of this size would
average in `exp_avg_sq`, without its forgetting (a plain mean, so without bias) and without clipping.

The file is the accumulator: a safetensors file mapped into memory, to which each parameter's squared gradient is
added as soon as backward has made it, after which the gradient is freed. Weights and one gradient at a time are all
that is held in memory.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from .checkpoint import DiskFull
from .errors import UserError

FORMAT = "epi-kernels importance"
VERSION = "1"
STATISTIC = "mean over batches of the squared gradient of the batch's mean loss an answer token (not a per-sample Fisher)"


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Metadata of an importance file; raises UserError when it is no safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from None


class Accumulator:
    """A safetensors file of zeros, shaped like the parameters, that grows into the mean of squared gradients.

    Use as a context manager: the file appears at `path` when it ends without an exception, else nothing is left.
    """

    def __init__(self, path: Path, shapes: Mapping[str, torch.Size], metadata: Mapping[str, str]):
        """Raises DiskFull when the file system has no room for the whole file."""
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        offset = 0
        for name, shape in shapes.items():
            end = offset + 4 * shape.numel()
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
        begin = 8 + len(text)
        try:
            with open(self.partial, "wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                file.flush()
                # All blocks now: a mapped page without a block on a full disk would kill the process with SIGBUS.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, begin + offset)
                else:
                    file.truncate(begin + offset)
        except OSError as error:
            self.partial.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(f"no space left for {path} ({(begin + offset) / 2**20:.1f} MiB)") from None
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        mapped = torch.from_file(str(self.partial), shared=True, size=begin + offset, dtype=torch.uint8)
        self.tensors: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            start, end = header[name]["data_offsets"]  # type: ignore[index]
            self.tensors[name] = mapped[begin + start : begin + end].view(torch.float32).view(shape)

    def add(self, name: str, gradient: torch.Tensor) -> None:
        """Adds the square of a gradient, squared in float32."""
        self.tensors[name].add_(gradient.detach().float().square().to("cpu"))

    def divide(self, batches: int) -> None:
        for tensor in self.tensors.values():
            tensor.div_(batches)

    def __enter__(self) -> Accumulator:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.tensors.clear()
        if kind is not None:
            self.partial.unlink(missing_ok=True)
            return
        descriptor = os.open(self.partial, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(self.partial, self.path)
