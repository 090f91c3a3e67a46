"""Parameters as FSDP2 leaves them on its only rank."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

import torch


class OfSquares(torch.nn.Module):
    """A model of these parameters, whose gradients are they themselves."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.params = torch.nn.ParameterList(params)

    def forward(self) -> torch.Tensor:
        return sum((0.5 * param.square().sum() for param in self.params), torch.zeros(()))


def under_fsdp2(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Shards with gradients, as FSDP2 leaves them on its only rank."""
    from torch.distributed.fsdp import fully_shard

    model = OfSquares(params)
    for param in params:
        param.grad = None
    fully_shard(model)
    model().backward()
    return list(model.parameters())


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()
