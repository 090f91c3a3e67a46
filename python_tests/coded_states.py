"""Parameters whose states are codes, large enough and too small for them, and runs that are stopped and resumed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from epi_kernels import MaskedEMAAdamW
from epi_kernels.optim.moments import read_moment
from python_tests.harness import assert_same_run, through_a_file, train

Named = dict[str, torch.nn.Parameter]


def params(dtype: torch.dtype = torch.float32) -> Named:
    generator = torch.Generator().manual_seed(0)
    shapes = {"large": (65, 77), "small": (9,), "whole": (64, 64)}
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in shapes.items()
    }


def check_resume(make: Callable[[Named], MaskedEMAAdamW], dtype: torch.dtype, stop: int) -> None:
    """Stopped after ``stop`` of nine steps and resumed, a run has the bits of one never stopped."""
    whole, first = params(dtype), params(dtype)
    straight, stopped = make(whole), make(first)
    train(straight, whole, range(9))
    train(stopped, first, range(stop))
    second = {name: torch.nn.Parameter(p.detach().clone()) for name, p in first.items()}
    resumed = make(second)
    resumed.load_state_dict(through_a_file(stopped.state_dict()))
    train(resumed, second, range(stop, 9))
    assert_same_run(straight, resumed)


def moment(optimizer: MaskedEMAAdamW, p: torch.Tensor, key: str = "exp_avg_sq") -> torch.Tensor:
    """Its values, whatever they are stored in: flat, row-major."""
    return read_moment(optimizer.state[p], key, p.shape, "state").reshape(-1)
