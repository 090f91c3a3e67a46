"""The processes of one run, which `torchrun` or `accelerate launch` starts: one a rank, one rank a GPU.

Every rank reads and checks the same files and takes its share of each step's rows. Rank 0 alone writes and speaks.
What one rank cannot do ends all of them: no rank waits for one that is gone.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError

Result = TypeVar("Result")

# Rank 0 writes a checkpoint meanwhile; when a rank has died, its launcher ends the others long before.
TIMEOUT = datetime.timedelta(hours=2)
BUCKET_BYTES = 25 << 20  # small gradients travel together; DistributedDataParallel's default


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. One process alone has no process group, and nothing here asks for one."""

    rank: int = 0
    size: int = 1
    local: int = 0  # among those on this machine: the number of its GPU

    @property
    def first(self) -> bool:
        return self.rank == 0

    @contextlib.contextmanager
    def speaking(self) -> Iterator[None]:
        """What is printed inside is rank 0's; tracebacks are printed outside."""
        if self.first:
            yield
            return
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield

    # ---------------------------------------------------------------- doing things together

    def together(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """`function(*arguments)` on every rank; when it raises on one, all raise.

        Between what may fail on one rank alone and the end of `function` there must be no reduction over the ranks.
        """
        if self.size == 1:
            return function(*arguments)
        result, error = None, None
        try:
            result = function(*arguments)
        except Exception as raised:
            error = raised
        failed = self.gathered(None if error is None else _told(error))
        _raise_first(failed, error)
        return result  # type: ignore[return-value]

    def first_does(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """`function(*arguments)` on rank 0 alone; every rank gets what it returns (pickled), or an error."""
        if self.size == 1:
            return function(*arguments)
        result, error = None, None
        if self.first:
            try:
                result = function(*arguments)
            except Exception as raised:
                error = raised
        both: list[Any] = [(result, None if error is None else _told(error))]
        dist.broadcast_object_list(both, src=0)
        result, failed = both[0]
        _raise_first([failed], error)
        return result  # type: ignore[return-value]

    def refuse_differences(self, values: Mapping[str, object], advice: str) -> None:
        """Raises UserError, on every rank, when they do not all have the same values."""
        if self.size == 1:
            return
        every = self.gathered(dict(values))
        differing = sorted(
            {name for one in every for name in one if any(one[name] != other.get(name) for other in every)}
        )
        if differing:
            raise UserError(f"the ranks differ in {', '.join(differing)}: {advice}", 1, shared=True)

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's `value` (pickled), in the ranks' order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    # ---------------------------------------------------------------- numbers of all ranks

    def sums(self, values: Sequence[float]) -> list[float]:
        """float64, element by element."""
        return self._reduced(values, torch.float64, dist.ReduceOp.SUM)

    def highest(self, value: int) -> int:
        return int(self._reduced([value], torch.int64, dist.ReduceOp.MAX)[0])

    def _reduced(self, values: Sequence[float], dtype: torch.dtype, how: Any) -> list:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=dtype, device="cpu")
        dist.all_reduce(tensor, how)
        return tensor.tolist()

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Every gradient becomes the sum of all ranks'; one that no rank has stays None.

        In place of DistributedDataParallel: that wants a forward pass of every rank and, of every parameter, a gradient
        on all of them or none; a step's last rows may be fewer than ranks, and rows may pass by an expert.
        """
        if self.size == 1 or not parameters:
            return
        device = parameters[0].device
        has = torch.tensor([one.grad is not None for one in parameters], dtype=torch.uint8, device=device)
        dist.all_reduce(has, dist.ReduceOp.MAX)
        gradients = []
        for parameter, anywhere in zip(parameters, has.tolist(), strict=True):
            if anywhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        self.add(gradients)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Every tensor becomes the sum of all ranks', which all have as many of the same shapes and dtypes."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                dist.all_reduce(bucket[0])
                continue
            flat = torch.cat([one.reshape(-1) for one in bucket])
            dist.all_reduce(flat)
            pieces = flat.split([one.numel() for one in bucket])
            for tensor, piece in zip(bucket, pieces, strict=True):
                tensor.copy_(piece.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """In order, of one dtype each."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _told(error: Exception) -> tuple[str, int]:
    text = str(error) if hasattr(error, "status") else f"{type(error).__name__}: {error}"
    return text, getattr(error, "status", 1)


def _raise_first(failed: Sequence[tuple[str, int] | None], own: Exception | None) -> None:
    """`failed`: what each rank raised. A rank's own bug keeps its traceback."""
    rank = next((rank for rank, one in enumerate(failed) if one is not None), None)
    if rank is None:
        return
    if own is not None and not isinstance(own, UserError):
        raise own
    text, status = failed[rank]  # type: ignore[misc]
    raise UserError(text if rank == 0 else f"rank {rank}: {text}", status, shared=True) from own


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that a launcher's environment speaks of, or those of a process group that is there already.

    The group that it makes ends with the process, after all ranks have come to their end; after an error nobody waits.
    """
    if dist.is_available() and dist.is_initialized():
        rank = dist.get_rank()
        yield Ranks(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)))
        return
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Ranks()
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set: start the processes with torchrun or accelerate launch"
        )
    rank = int(os.environ["RANK"])
    ranks = Ranks(rank, size, int(os.environ.get("LOCAL_RANK", rank)))
    cuda = torch.cuda.is_available()
    if cuda and ranks.local < torch.cuda.device_count():
        torch.cuda.set_device(ranks.local)
    # Numbers that the host needs go through gloo, without waiting for the GPU's queue.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    yield ranks
    dist.barrier()
