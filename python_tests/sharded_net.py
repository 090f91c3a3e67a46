"""A small net and its optimizer, whole or sharded: trained by gradients that every rank knows, and compared to the bit."""

from __future__ import annotations

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from epi_kernels import MaskedEMAAdamW
from epi_kernels.distributed.shards import local
from epi_kernels.optim.sharded_state import exported
from python_tests.sharded import whole

OPTIONS = {
    "float32": {"importance_beta": 0.9},
    "8-bit": {"state_dtype": "int8", "importance_beta": 0.9, "importance_dtype": "int8"},
    "4-bit": {"state_dtype": "int4"},
    "24 bits": {"dtype": torch.bfloat16, "master_weight_bits": 24},
}


class Net(nn.Module):
    """``width`` 64: blocks of 8-bit codes begin with a row, so that they are one process's however rows are shared out."""

    def __init__(self, dtype, width: int = 64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"a": (65, width), "b": (7,), "c": (5, 3)}.items():
            weight = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(weight))


def made(case: str, *, sharded: bool, **more):
    options = dict(OPTIONS[case]) | more
    net = Net(options.pop("dtype", torch.float32), options.pop("width", 64))
    if sharded:
        fully_shard(net)
    return net, MaskedEMAAdamW(
        net.named_parameters(), lr=1e-2, isolation_ratio=0.1, mask_interval=2, **options
    )


def grad(name: str, param, step: int) -> torch.Tensor:
    seed = 1000 * step + ord(name)
    return torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)).to(param.dtype)


def part(full: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    return (
        distribute_tensor(full, param.device_mesh, param.placements) if isinstance(param, DTensor) else full
    )


def steps(net, optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        for name, param in net.named_parameters():
            param.grad = part(grad(name, param, step), param)
        optimizer.step()
    optimizer.zero_grad()


def contents(net, optimizer) -> dict:
    """Weights, masks and every state, unsharded; codes as the numbers they stand for."""
    found = {}
    full = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True))
    for name, param in net.named_parameters():
        found[name] = whole(param.detach()).clone()
        found[name, "isolated"] = whole(optimizer.isolation_mask(param))
        found[name, "master"] = whole(optimizer.master_weight(param))
        for key, value in full["state"].get(name, {}).items():
            found[name, key] = value.clone()
    return found


def persistent(param) -> torch.Tensor:
    mask = torch.zeros(param.shape, dtype=torch.bool)
    mask.view(-1)[::5] = True
    return mask


def differing(one: dict, other: dict) -> list:
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]


def held(net, optimizer) -> dict:
    """Weights and every state, laid out as a sharded state dict has them; of one process whole, else this rank's part."""
    found = {}
    for name, param in net.named_parameters():
        found[name, "weight"] = local(param.detach()).clone()
        for key, value in exported(optimizer.state[param], param).items():
            found[name, key] = local(value).clone()
    return found


def trained(case: str, *, sharded: bool):
    """After two refreshes, in the middle of an interval."""
    net, optimizer = made(case, sharded=sharded)
    optimizer.set_isolation_mask(net.b, persistent(net.b), persistent=True)
    steps(net, optimizer, 0, 5)
    return net, optimizer


def in_place(folder: str, net, optimizer) -> None:
    """As torch's documentation has it."""
    model_state, optimizer_state = get_state_dict(net, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
