"""Where a parameter's state lies and its step is computed: beside it, or in host memory with ``offload="cpu"``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from epi_kernels.distributed.shards import is_sharded, local
from epi_kernels.optim.arguments import IsolationConfig
from epi_kernels.optim.pages import zeros

HOST = torch.device("cpu")


def home(param: Tensor, config: IsolationConfig) -> torch.device:
    return local(param).device if config.offload is None else HOST


def home_zeros(
    shape: Sequence[int], dtype: torch.dtype, param: Tensor, config: IsolationConfig | None
) -> Tensor:
    """Room for state of ``param``; pinned where it is kept away from a GPU. ``config`` None: beside the parameter."""
    weight = local(param)
    if config is None or config.offload is None:
        return zeros(shape, dtype, weight.device)
    return zeros(shape, dtype, HOST, pinned=weight.is_cuda)


def bring_home(
    params: Iterable[Tensor], state_of: Mapping[Tensor, dict[str, Any]], config: IsolationConfig
) -> None:
    """Offloaded states that somebody has moved beside their parameters come back: Lightning does so when it resumes."""
    if config.offload is None:
        return
    for param in params:
        state = state_of.get(param, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and not value.is_cpu:
                state[key] = home_zeros(value.shape, value.dtype, param, config).copy_(value)


def offload_refusal(param: Tensor) -> str | None:
    """Why the states of this parameter cannot be kept in host memory; None when they can."""
    if is_sharded(param):
        return (
            "is a DTensor, whose states offload='cpu' does not keep in host memory: leave offload out, for under "
            "FSDP2 each rank holds its own share of the states alone"
        )
    if param.device.type not in ("cuda", "cpu"):
        return f"is on {param.device}: offload='cpu' copies between host memory and CUDA (or CPU) parameters"
    return None
