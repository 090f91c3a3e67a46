"""An ``OptimizerInfo`` a backend, for torch's own way of testing optimizers."""

from __future__ import annotations

import unittest
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau, StepLR
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)
from torch.testing._internal.opinfo.core import DecorateInfo

from epi_kernels import MaskedEMAAdamW
from python_tests.harness import Target, triton_has_wheels

SOON = {"isolation_ratio": 0.1, "mask_interval": 2}


def inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    """Constructor arguments, params left out."""
    configurations: dict[str, dict[str, Any]] = {
        "default": {},
        "other lr": {"lr": 0.01},
        "weight decay": {"weight_decay": 0.1},
        "maximize": {"weight_decay": 0.1, "maximize": True},
        "lr as a tensor": {"lr": torch.tensor(0.01)},
        "no isolation": {"isolation_ratio": 0.0},
        "early refreshes": SOON,
        "own importance": {"importance_beta": 0.9, **SOON},
        "hysteresis, a threshold a layer": {"hysteresis": 0.5, "scope": "layer", **SOON},
        "bfloat16 states": {"state_dtype": torch.bfloat16, **SOON},
        "8-bit states": {"state_dtype": "int8", "importance_beta": 0.9, "importance_dtype": "int8", **SOON},
    }
    return [OptimizerInput(params=None, kwargs=kwargs, desc=name) for name, kwargs in configurations.items()]


def few_inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    """Of an interpreted backend, which takes a hundred times as long."""
    kwargs = {"isolation_ratio": 0.1, "mask_interval": 5}
    return [OptimizerInput(params=None, kwargs=kwargs, desc="a few refreshes")]


def error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    """torch's for every optimizer, but that a tensor lr of two elements is refused in other words; and ours."""
    ours = {
        "betas[0]": {"betas": (1.0, 0.0)},
        "betas[1]": {"betas": (0.9, -0.1)},
        "weight_decay": {"weight_decay": -1},
        "eps": {"eps": -1e-8},
        "lr": {"lr": torch.tensor([0.001, 0.001])},
        "isolation_ratio": {"isolation_ratio": 1.0},
        "mask_interval": {"mask_interval": 0},
        "amsgrad": {"amsgrad": True},
        "differentiable": {"differentiable": True},
    }
    of_torch = [
        one
        for one in get_error_inputs_for_all_optims(device, dtype)
        if "lr" not in one.optimizer_error_input.kwargs
    ]
    return of_torch + [
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs=kwargs, desc=name),
            error_type=ValueError,
            error_regex=name.replace("[", r"\[").replace("]", r"\]"),
        )
        for name, kwargs in ours.items()
    ]


# with a device Triton's kernels run on it, without one through its interpreter
_NOT_ON = {"cpu": ["cuda"], "triton": ["cpu"] if torch.cuda.is_available() else []}


def info(backend: str) -> OptimizerInfo:
    """Of a class whose default is this backend."""
    interpreted = Target(backend).interpreted and not torch.cuda.is_available()

    class Optimizer(MaskedEMAAdamW):
        def __init__(self, params, *args, **kwargs):
            super().__init__(params, *args, **({"backend": backend} | kwargs))

    Optimizer.__name__ = f"MaskedEMAAdamW_{backend}"
    return OptimizerInfo(
        Optimizer,
        optim_inputs_func=few_inputs if interpreted else inputs,
        optim_error_inputs_func=error_inputs,
        scheduler_inputs=([lambda optimizer: StepLR(optimizer, gamma=0.9, step_size=10)],)
        if interpreted
        else (
            [lambda optimizer: StepLR(optimizer, gamma=0.9, step_size=10)],
            [lambda optimizer: CosineAnnealingLR(optimizer, T_max=60)],
            [lambda optimizer: LambdaLR(optimizer, lambda epoch: 0.97**epoch)],
            [
                lambda optimizer: StepLR(optimizer, gamma=0.99, step_size=5),
                lambda optimizer: ReduceLROnPlateau(optimizer),
            ],
        ),
        supported_impls=("foreach", "fused"),
        supports_fused_on=("cpu", "cuda"),
        supports_complex=False,
        skips=[
            DecorateInfo(unittest.skip(f"the {backend} backend does not run there"), device_type=device)
            for device in _NOT_ON.get(backend, ())
        ],
    )


INFOS = [info(name) for name in ("reference", "cpu", *(["triton"] if triton_has_wheels() else []))]
