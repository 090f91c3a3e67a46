"""`--fsdp`: a model whose weights, gradients and optimizer states lie over the ranks; its checkpoints are whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epi_kernels.distributed.shards import is_sharded, shard_of, wrap
from epi_kernels.integrations import transformer_block
from epi_kernels.optim.sharded_state import compact

from .ranks import Ranks


def shard(net: torch.nn.Module, ranks: Ranks, device: str) -> None:
    """FSDP2 over all ranks, each transformer block by itself; moves the model to `device`, a block at a time.

    Gradients are added up, not averaged: a loss is a share of the whole step's.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(torch.device(device).type, (ranks.size,))
    names = [name for name, _ in net.named_parameters()]
    blocks = [block for block in dict.fromkeys(map(transformer_block, names)) if block not in names]
    for module in (*(net.get_submodule(str(block)) for block in blocks), net):
        # The root's too: whoever reads parameters after an evaluation finds shards.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def whole_weights(net: torch.nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """The state dict of the model, whole, in rank 0's host memory; empty on the others. A call of all ranks."""
    found: dict[int, Tensor] = {}
    named = {}
    for name, value in net.state_dict(keep_vars=True).items():
        if id(value) not in found:  # tied ones stay one tensor
            found[id(value)] = _whole(value.detach(), ranks)
        named[name] = found[id(value)]
    return named if ranks.first else {}


def whole_state(optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Any]:
    """The optimizer's state dict as one process would have it, with rank 0's host memory for what is sharded; the
    others' are without states. A call of all ranks."""
    saved = optimizer.state_dict()
    states = {}
    for number, state in saved["state"].items():
        if any(map(is_sharded, state.values())):
            gathered = {key: _whole(value, ranks) for key, value in state.items()}
            state = compact(gathered) if ranks.first else {}
        states[number] = state
    return {**saved, "state": states if ranks.first else {}}


def _whole(value: Any, ranks: Ranks) -> Any:
    if not is_sharded(value):
        return value
    full = value.full_tensor()
    return full.cpu() if ranks.first else full.new_empty(0)


def laid_out(state_dict: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole state dict as torch.optim.AdamW over sharded parameters must be given it: each rank's part of it.

    MaskedEMAAdamW takes whole ones.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = {}
    for number, state in state_dict["state"].items():
        param = params[number]
        states[number] = {
            key: _part(value, param) if is_sharded(param) and value.shape == param.shape else value
            for key, value in state.items()
        }
    return {**state_dict, "state": states}


def _part(value: Tensor, param: Tensor) -> Tensor:
    box = shard_of(param)
    assert box is not None  # FSDP2 cuts along the first axis
    return wrap(value[box.slices].to(param.device).contiguous(), param)
