"""Optimizers whose masks and importance go through a file."""

from __future__ import annotations

import torch

from python_tests.harness import make, small_model, train

STORAGES = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float32-weights-bfloat16-state": (torch.float32, {"state_dtype": torch.bfloat16}),
    "own-float32": (torch.bfloat16, {"importance_beta": 0.9}),
    "own-bfloat16": (torch.float32, {"importance_beta": 0.9, "importance_dtype": torch.bfloat16}),
    "int8": (torch.bfloat16, {"state_dtype": "int8"}),
    "own-int8": (torch.float32, {"importance_beta": 0.9, "importance_dtype": "int8"}),
    "ratio-0": (torch.float32, {"isolation_ratio": 0.0}),
}


def model(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.nn.Parameter]:
    """Awkward sizes, an empty one, and one that is large enough for 8-bit codes."""
    generator = torch.Generator().manual_seed(seed)
    large = torch.randn(65, 67, generator=generator).to(dtype)
    more = {
        "head.weight": torch.nn.Parameter(large),
        "empty": torch.nn.Parameter(torch.zeros(0, 3, dtype=dtype)),
    }
    return small_model(dtype, seed) | more


def trained(dtype: torch.dtype = torch.float32, steps: int = 5, **arguments):
    """(parameters, optimizer) after some steps, with persistent bits of one parameter; "scale" was never stepped."""
    params = model(dtype)
    params["scale"].requires_grad_(False)
    optimizer = make(params, **arguments)
    optimizer.set_isolation_mask(params["embed"], torch.arange(95).reshape(19, 5) % 4 == 0, persistent=True)
    for number in range(steps):
        train(
            optimizer, {name: p for name, p in params.items() if name != "scale"}, range(number, number + 1)
        )
    return params, optimizer


def own(arguments: dict) -> bool:
    return "importance_beta" in arguments
