"""What of a parameter lies on this rank: a DTensor's own part (FSDP2, tensor parallel), or all of a plain tensor."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# The wrapper's own tensor. ``to_local()`` goes through autograd and takes 20 times as long, which hundreds of
# parameters would feel in every step.
_LOCAL = attrgetter("_local_tensor")


def is_sharded(value: Any) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, replicated ones included."""
    module = sys.modules.get("torch.distributed.tensor")  # who has one has imported it
    return module is not None and isinstance(value, module.DTensor)


def any_sharded(tensors: Sequence[Tensor]) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and module.DTensor in set(map(type, tensors))


def local(tensor: Tensor) -> Tensor:
    """The memory on this rank."""
    return _LOCAL(tensor) if is_sharded(tensor) else tensor


def locals_of(tensors: Sequence[Tensor], sharded: Sequence[bool]) -> list[Tensor]:
    """``local`` of each; ``sharded``: which of them are DTensors."""
    return [_LOCAL(tensor) if one else tensor for tensor, one in zip(tensors, sharded, strict=True)]


def local_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], bool]:
    """The gradients' memory on this rank, laid out as the parameters are; a redistributed one becomes ``.grad``.

    Returns also whether all of them are DTensors that share their parameters' specs, dtype and shape included.

    Raises:
        RuntimeError: a DTensor's gradient is none, or lies on another mesh.
    """
    from torch.distributed.tensor import DTensor

    found: list[Tensor | None] = []
    alike = True
    for param, grad in zip(params, grads, strict=True):
        if grad is None:
            found.append(None)
        elif type(param) is not DTensor:
            alike = False
            found.append(grad)
        elif type(grad) is DTensor and grad._spec is param._spec and type(grad._local_tensor) is Tensor:
            found.append(grad._local_tensor)  # as FSDP2 leaves them: asked of hundreds in every step
        else:
            alike = False
            found.append(_laid_out(param, grad))
    return found, alike


def gradients(params: Sequence[Tensor], *, any_sharded: bool) -> tuple[list[Tensor | None], bool]:
    """Of all parameters; of sharded ones what ``local_grads`` gives, which costs a look at each."""
    grads = [param.grad for param in params]
    return local_grads(params, grads) if any_sharded else (grads, False)


def _laid_out(param: Any, grad: Any) -> Tensor:
    if not is_sharded(grad) or grad.device_mesh != param.device_mesh:
        raise RuntimeError(
            f"a gradient is a {type(grad).__name__} beside a parameter that is a DTensor on {param.device_mesh}: "
            "gradients must be DTensors on their parameter's mesh"
        )
    if grad.placements != param.placements:  # Partial, say, of a weight that tensor parallelism replicates
        grad = param.grad = grad.redistribute(placements=param.placements)
    piece: Any = grad.to_local()
    return piece.wait() if hasattr(piece, "wait") else piece  # an async collective's result


def wrap(piece: Tensor, param: Tensor) -> Tensor:
    """State that belongs beside this rank's part of ``param``: as it is, or a DTensor where ``param`` is one."""
    if not is_sharded(param):
        return piece
    from torch.distributed.tensor import DTensor

    stride = tuple(math.prod(param.shape[axis + 1 :]) for axis in range(param.ndim))
    return DTensor.from_local(
        piece, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=stride
    )


def refusal(param: Tensor) -> str | None:
    """Why the optimizer cannot take this parameter; None when it can."""
    if getattr(param, "_fsdp_flattened", False):
        return (
            "is flattened by FullyShardedDataParallel (FSDP1), which tears layers apart: use FSDP2, "
            "torch.distributed.fsdp.fully_shard"
        )
    if hasattr(param, "ds_id"):
        return (
            "is partitioned by DeepSpeed ZeRO-3, which flattens parameters: use FSDP2, "
            "torch.distributed.fsdp.fully_shard"
        )
    if is_sharded(param):
        if any(placement.is_partial() for placement in param.placements):
            return "is a DTensor with partial values: redistribute it to Shard or Replicate placements"
        if shard_of(param) is None:
            return (
                f"is a DTensor of placements {param.placements} and shape {list(param.shape)}, whose parts are no "
                "boxes of the whole: choose shapes that the mesh divides, or other placements"
            )
    return None


@dataclass(frozen=True, slots=True)
class Shard:
    """A box of a tensor, of which element j of axis a is element ``offset[a] + j`` of the whole tensor's."""

    whole: tuple[int, ...]  # shape of the tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where the box lies in the whole tensor."""
        return tuple(slice(start, start + n) for start, n in zip(self.offset, self.shape, strict=True))

    def index(self) -> LogicalIndex | None:
        """Logical positions of the box's elements, where two levels of counting give them; else None."""
        if self.n_elements == 0:
            return LogicalIndex(0, 0, 0)
        strides = [math.prod(self.whole[axis + 1 :]) for axis in range(len(self.whole))]
        offset = sum(start * stride for start, stride in zip(self.offset, strides, strict=True))
        cut = [axis for axis, (n, whole) in enumerate(zip(self.shape, self.whole, strict=True)) if n != whole]
        if not cut or math.prod(self.shape[: cut[-1]]) == 1:
            return LogicalIndex(offset, 0, 0)
        last = cut.pop()
        cut = [axis for axis in cut if math.prod(self.shape[: axis + 1]) > 1]
        if len(cut) > 1 or (cut and math.prod(self.shape[: cut[0]]) > 1):
            return None
        # runs of neighbours, as far apart as whole rows are
        return LogicalIndex(offset, self.shape[last] * strides[last], self.whole[last] * strides[last])


@dataclass(frozen=True, slots=True)
class LogicalIndex:
    """Element i of a box is element ``offset + i // run * stride + i % run`` of the whole; run 0: ``offset + i``."""

    offset: int
    run: int
    stride: int


def shard_of(tensor: Tensor) -> Shard | None:
    """This rank's box of ``tensor``; None where its part is no box."""
    whole = tuple(tensor.shape)
    if not is_sharded(tensor):
        return Shard(whole, (0,) * len(whole), whole)
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # this rank is not in the mesh
        return Shard(whole, (0,) * len(whole), (0,) * len(whole))
    cuts = [
        (
            getattr(placement, "dim", 0),
            int(getattr(placement, "split_factor", 1)),
            tensor.device_mesh.size(axis),
            position,
        )
        for axis, (placement, position) in enumerate(zip(tensor.placements, coordinate, strict=True))
        if not placement.is_replicate()
    ]
    return _box(whole, tuple(cuts))


@functools.lru_cache(maxsize=4096)
def _box(whole: tuple[int, ...], cuts: tuple[tuple[int, int, int, int], ...]) -> Shard | None:
    """``cuts``: (axis, pieces that are cut one by one, ranks, this rank's position), in the mesh's order."""
    rows = [torch.arange(n, device="cpu") for n in whole]
    for axis, pieces, ranks, position in cuts:
        rows[axis] = _part(rows[axis], pieces, ranks, position)
    offset, shape = [], []
    for row in rows:
        if row.numel() and int(row[-1]) - int(row[0]) + 1 != row.numel():
            return None
        offset.append(int(row[0]) if row.numel() else 0)
        shape.append(row.numel())
    return Shard(whole, tuple(offset), tuple(shape))


def _part(rows: Tensor, parts: int, ranks: int, position: int) -> Tensor:
    """Rank ``position``'s rows. ``parts`` > 1: of each of so many pieces (a strided shard, split right to left)."""
    pieces = _chunks(rows, parts) if parts > 1 else [rows]
    return torch.cat([_chunks(piece, ranks)[position] for piece in pieces])


def _chunks(rows: Tensor, n: int) -> list[Tensor]:
    """As torch.chunk, with empty ones at the end."""
    size = -(-rows.numel() // n)
    return [rows[i * size : (i + 1) * size] for i in range(n)]
