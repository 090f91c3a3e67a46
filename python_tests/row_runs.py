"""Runs in which whole rows or blocks are isolated persistently, beside the oracle and beside element-wise runs."""

from __future__ import annotations

import numpy as np
import torch

from epi_kernels import MaskedEMAAdamW
from epi_kernels.optim.compact import RUNS_KEY
from python_tests.cases import Spec, case
from python_tests.harness import Pair, Target, give_gradients
from python_tests.oracle import Hyper

# 96 and 72 are no multiples of 64: rows begin inside the blocks that have state or none
SHAPES = {"w": (64, 96), "tail": (61, 72), "gone": (32, 128), "bias": (40,)}

ROUNDS = {  # settings of `row_pair`
    "float32": {},
    "bfloat16": {"dtype": "bfloat16", "hysteresis": 0.2, "scope": "layer"},
    "8 bits": {"state_dtype": "int8", "dtype": "bfloat16", "master_weight_bits": 24},
    "own importance": {
        "layout": "transposed",
        "hyper": Hyper(importance_beta=0.9, maximize=True),
        "importance_dtype": "int8",
        "state_dtype": "bfloat16",
    },
}


def masks() -> dict[str, torch.Tensor]:
    """Rows of "w" inside, of "tail" at both ends, all of "gone"."""
    found = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in SHAPES.items() if name != "bias"}
    found["w"][7:31] = True
    found["w"][40:52] = True
    found["tail"][:20] = True
    found["tail"][45:] = True
    found["gone"][:] = True
    return found


def stateless(mask: np.ndarray) -> np.ndarray:
    """[n] bool: blocks of 64 elements of which none may move."""
    blocks = np.pad(mask.reshape(-1), (0, -mask.size % 64), constant_values=True).reshape(-1, 64)
    return np.repeat(blocks.all(axis=1), 64)[: mask.size]


def row_pair(target: Target, *, layout: str = "contiguous", dtype: str = "float32", **settings) -> Pair:
    """Ours by rows and the oracle, the masks installed after a first step."""
    specs = [Spec(shape, dtype, layout, layout) for shape in SHAPES.values()]
    pair = Pair(case(*specs, isolation_granularity="row", **settings), target)
    pair.step(pair.gradients(["normal"] * len(SHAPES)))
    for number, (name, mask) in enumerate(masks().items()):
        param, expected = pair.params[number], pair.oracle.params[number]
        pair.optimizer.set_isolation_mask(param, mask.to(param.device), persistent=True)
        assert RUNS_KEY in pair.optimizer.state[param], name
        expected.persistent = mask.numpy().reshape(-1)
        expected.mask = expected.mask | expected.persistent
        expected.stateless = stateless(mask.numpy())
        for moment in (expected.exp_avg, expected.exp_avg_sq, expected.importance):
            if moment is not None:
                moment[expected.stateless] = 0
    return pair


def model(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def begun(
    granularity: str = "row", dtype: torch.dtype = torch.float32, steps: int = 5, **options
) -> tuple[dict[str, torch.nn.Parameter], MaskedEMAAdamW]:
    """A model in training whose persistent masks were installed before the first step."""
    params = model(dtype)
    optimizer = fresh(params, granularity, **options)
    for name, mask in masks().items():
        optimizer.set_isolation_mask(params[name], mask, persistent=True)
    go_on(params, optimizer, range(steps))
    return params, optimizer


def fresh(params: dict[str, torch.nn.Parameter], granularity: str = "row", **options) -> MaskedEMAAdamW:
    defaults = {"lr": 1e-2, "isolation_ratio": 0.1, "mask_interval": 2, "backend": "cpu"}
    return MaskedEMAAdamW(list(params.items()), isolation_granularity=granularity, **(defaults | options))


def go_on(params: dict[str, torch.nn.Parameter], optimizer: MaskedEMAAdamW, steps: range) -> None:
    for number in steps:
        give_gradients(params, number)
        optimizer.step()
