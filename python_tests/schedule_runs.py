"""Schedules, gradients whose importances agree or drift, and how tests follow a run under them."""

from __future__ import annotations

import torch

from epi_kernels import AdaptiveInterval, AdaptiveRatio
from epi_kernels.optim import schedules
from python_tests.harness import give_gradients

N = 152  # elements of small_model


def slower(T: int) -> int:
    return 1 + T // 3


def wave(T: int) -> float:
    return (0.0, 0.1, 0.45, 0.2)[T % 4]


SCHEDULES = {
    "functions": {"mask_interval": slower, "isolation_ratio": wave},
    "interval": {"mask_interval": AdaptiveInterval(2, maximum=8, low=0.45, high=0.55), "betas": (0.5, 0.7)},
    "ratio": {"isolation_ratio": AdaptiveRatio(0.1, low=0.45, high=0.55, factor=1.3), "betas": (0.5, 0.7)},
    "both": {
        "mask_interval": AdaptiveInterval(2, low=0.5, high=0.6, factor=1.6),
        "isolation_ratio": AdaptiveRatio(0.2, low=0.5, high=0.6),
        "mask_warmup": 1,
        "state_dtype": torch.bfloat16,
    },
}


def refreshes(optimizer, params, steps, give=give_gradients) -> list:
    """The reports of the refreshes that followed these steps."""
    seen = []
    for number in range(steps):
        give(params, number)
        last = optimizer.isolation_report()
        optimizer.step()
        if optimizer.isolation_report() is not last:
            seen.append(optimizer.isolation_report())
    return seen


def the_same(params, number):
    """Importances whose order never changes."""
    give_gradients(params, 0)


def disjoint(params, number):
    """Importances that share nothing with those of the step before, where no moment remembers (betas of 0)."""
    offset = 0
    for p in params.values():
        place = torch.arange(offset, offset + p.numel()).view(p.shape)
        p.grad = torch.where(place % 4 == number % 4, 1.0 + place / N, 0.0)
        offset += p.numel()


def held(optimizer) -> list[dict]:
    """What every group remembers of schedules."""
    return [{k: group[k] for k in schedules.KEYS if k in group} for group in optimizer.param_groups]
