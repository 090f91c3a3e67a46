"""Chunk tables: many tensors of one variant in one launch.

A chunk is a run of elements of one tensor and the work of one program. The whole blocks of a tensor
are cut into chunks, and what is left of it is a chunk of its own: where the tensor's addresses are
proven to be aligned, the former take the kernel's FULL form, which knows no bounds.

A chunk's row holds the tensor's index, the first element, the number of elements and a slot of its
own for partial results. The slots
are numbered by layer, tensor and position, whatever the variant, so that partial results of a layer
lie together and are added up in an order that depends on nothing but the list of tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from epi_kernels.backends.triton.common import ALIGNMENT

SAMPLE_RUN = 64  # reference.threshold.SAMPLE_BLOCK


class Variant(Protocol):
    """What a kernel is specialised on for a tensor; a NamedTuple."""

    @property
    def full(self) -> bool:
        """Of a tensor: its addresses are aligned. Of a launch: its chunks are whole blocks too."""
        ...

    @property
    def block(self) -> int:
        """Elements of a block."""
        ...


class Launch(NamedTuple):
    variant: Any  # Variant
    first: int  # row of the chunk table
    programs: int


class Plan(NamedTuple):
    """How a list of tensors is cut, on the host."""

    chunks: np.ndarray  # [chunks, 4] int64: tensor, start, count, slot; a launch's rows lie together
    launches: tuple[Launch, ...]
    spans: np.ndarray  # [layers that occur, 4] int64: layer, first slot, one past the last, 0


def aligned(addresses: np.ndarray, start_bytes: np.ndarray) -> np.ndarray:
    """[tensors] bool: whether accesses of ALIGNMENT bytes may start there.

    ``addresses`` and ``start_bytes``: [tensors, accessed] int64; where a chunk starts in each of the
    arrays that its kernel reads and writes in full width. An address of 0 stands for "none".
    """
    return ((addresses + np.where(addresses == 0, 0, start_bytes)) % ALIGNMENT == 0).all(axis=1)


def aligned_tensors(addresses: np.ndarray, item_bytes: np.ndarray, chunk: int) -> np.ndarray:
    """[tensors] bool: every chunk of the tensor starts aligned in every array.

    The chunks start at multiples of ``chunk``, so the first two decide about all.
    """
    return aligned(addresses, np.zeros_like(item_bytes)) & aligned(addresses, item_bytes * chunk)


def sampled_elements(n_elements: int, stride: int) -> int:
    """Elements in every ``stride``-th run of SAMPLE_RUN elements; the last run may be shorter."""
    if stride == 1 or n_elements == 0:
        return n_elements
    last_run = (-(-n_elements // SAMPLE_RUN) - 1) // stride
    return last_run * SAMPLE_RUN + min(SAMPLE_RUN, n_elements - last_run * stride * SAMPLE_RUN)


def plan(sizes: Sequence[int], variants: Sequence[Any], layers: Sequence[int], chunk: int) -> Plan:
    """Cuts tensors of ``sizes`` elements into chunks of at most ``chunk``, a multiple of every block."""
    size = np.asarray(sizes, dtype=np.int64)
    block = np.asarray([variant.block for variant in variants], dtype=np.int64)
    whole = size // block * block
    whole_chunks = -(-whole // chunk)
    per_tensor = whole_chunks + (size > whole)
    tensor = np.repeat(np.arange(len(size)), per_tensor)
    turn = np.arange(len(tensor)) - (np.cumsum(per_tensor) - per_tensor)[tensor]
    is_rest = turn >= whole_chunks[tensor]
    start = np.where(is_rest, whole[tensor], turn * chunk)
    end = np.where(is_rest, size[tensor], np.minimum(start + chunk, whole[tensor]))

    layer = np.asarray(layers, dtype=np.int64)[tensor]
    by_layer = np.argsort(layer, kind="stable")
    slot = np.empty_like(by_layer)
    slot[by_layer] = np.arange(len(by_layer))
    rows, number = np.unique(layer, return_counts=True)
    first = np.cumsum(number) - number
    spans = np.stack([rows, first, first + number, np.zeros_like(rows)], axis=1)

    names = list(dict.fromkeys(variants))
    bounded = [variant._replace(full=False) for variant in names]
    # two codes a name: its whole chunks, and what must stay in bounds
    name = np.asarray([names.index(variant) for variant in variants], dtype=np.int64)
    code = 2 * name[tensor] + is_rest
    # an unaligned tensor has one form only: its launch is that of an aligned one's rests
    code_of = {variant: 2 * i + 1 for i, variant in enumerate(bounded)}
    same_launch = np.asarray(
        [c for i, v in enumerate(names) for c in (2 * i if v.full else code_of[v], code_of[bounded[i]])],
        dtype=np.int64,
    )
    code = same_launch[code] if len(code) else code
    by_launch = np.argsort(code, kind="stable")
    chunks = np.stack([tensor, start, end - start, slot], axis=1)[by_launch]
    codes, firsts, programs = np.unique(code[by_launch], return_index=True, return_counts=True)
    launches = tuple(
        Launch((bounded if c % 2 else names)[c // 2], int(f), int(n))
        for c, f, n in zip(codes.tolist(), firsts, programs, strict=True)
    )
    return Plan(chunks, launches, spans[rows >= 0])


class DevicePlan:
    """A plan whose tables lie on the device, with the slots for partial results."""

    def __init__(self, host: Plan, device: torch.device) -> None:
        self.launches = host.launches
        self.chunks = upload(host.chunks, device)
        self.spans = upload(host.spans, device)
        self._partials: Tensor | None = None

    @property
    def partials(self) -> Tensor:
        """[chunks, 2] fp64: 16 bytes a chunk, made once and kept with the table."""
        if self._partials is None:
            self._partials = self.chunks.new_empty((len(self.chunks), 2), dtype=torch.float64)
        return self._partials


def upload(table: np.ndarray, device: torch.device) -> Tensor:
    """Asynchronous copy through pinned memory, which torch keeps until the copy is over."""
    host = torch.from_numpy(np.ascontiguousarray(table))
    if device.type != "cuda":
        return host.clone()
    return host.pin_memory().to(device, non_blocking=True)


class Cache:
    """The few most recently used device tables, by what they were made from."""

    def __init__(self, capacity: int = 16) -> None:
        self._entries: OrderedDict[Hashable, object] = OrderedDict()
        self._capacity = capacity

    def get(self, key: Hashable, make: Callable[[], object]):
        """The entry of ``key``, made where it is missing.

        Reuse is ordered by the stream alone, so the stream belongs in the key.
        """
        if key in self._entries:
            self._entries.move_to_end(key)
        else:
            self._entries[key] = make()
            if len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        return self._entries[key]
