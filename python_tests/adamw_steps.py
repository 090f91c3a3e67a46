"""Steps beside torch.optim.AdamW, each from the same state."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from python_tests.harness import train

Params = dict[str, torch.Tensor]


def steps_from_one_state(
    adamw: torch.optim.Optimizer, theirs: Params, optimizer: torch.optim.Optimizer, ours: Params, count: int
) -> Iterator[None]:
    """Stops after each step of both; before the next one ours takes AdamW's weights and state."""
    for number in range(count):
        with torch.no_grad():
            for name in ours:
                ours[name].copy_(theirs[name])
        if number:
            optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
        train(adamw, theirs, range(number, number + 1))
        train(optimizer, ours, range(number, number + 1))
        yield
