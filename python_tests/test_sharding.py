"""Sharded parameters: masks, weights and states are those of one process, to the bit, however they are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard, init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard

from epi_kernels import AdaptiveInterval, AdaptiveRatio, MaskedEMAAdamW
from python_tests.ranks import on_ranks
from python_tests.sharded import REFRESHES, cut, gradient, weights, whole

OPTIONS = {
    "float32": {},
    "float32, zscore": {"normalization": "zscore"},
    "float32, none, a threshold a layer, hysteresis": {
        "normalization": "none",
        "scope": "layer",
        "hysteresis": 0.3,
    },
    "float32, own importance, layers of blocks": {
        "importance_beta": 0.9,
        "layer_key": lambda name: name.rpartition(".")[0],
    },
    "float32, functions of T": {
        "mask_interval": lambda T: 2 if T < 3 else 3,
        "isolation_ratio": lambda T: 0.01 * (T + 1),
    },
    "float32, adaptive": {
        "mask_interval": AdaptiveInterval(2, maximum=3, low=0.05, high=0.1),
        "isolation_ratio": AdaptiveRatio(0.07, low=0.05, high=0.1),
    },
    "bfloat16": {},
    "bfloat16, 24 bits": {"master_weight_bits": 24},
    "bfloat16, 4-bit": {"state_dtype": "int4"},
    "bfloat16, 8-bit": {"state_dtype": "int8", "importance_beta": 0.9, "importance_dtype": "int8"},
}
# what each mesh does with a tensor of one, two and three dimensions
LAYOUTS = {
    "FSDP on 1": ((1,), lambda n: [Shard(0)]),
    "FSDP on 2": ((2,), lambda n: [Shard(0)]),
    "FSDP on 3": ((3,), lambda n: [Shard(0)]),
    "FSDP on 4": ((4,), lambda n: [Shard(0)]),
    "the last dimension on 3": ((3,), lambda n: [Shard(n - 1)]),
    "HSDP": ((2, 2), lambda n: [Replicate(), Shard(0)]),
    "columns and FSDP": ((2, 2), lambda n: [Shard(0), Shard(n - 1) if n > 1 else Replicate()]),
    "rows and FSDP": ((2, 2), lambda n: [_StridedShard(0, split_factor=2), Shard(0)]),
}


def train(params: dict[str, nn.Parameter], place, backend: str, options: dict, steps: int = 7) -> dict:
    """Everything that must be the same on any number of ranks, unsharded."""
    optimizer = MaskedEMAAdamW(
        params.items(), lr=1e-2, weight_decay=0.1, backend=backend, **(REFRESHES | options)
    )
    for step in range(steps):
        for name, param in params.items():
            param.grad = place(gradient(name, step, param.dtype))
        optimizer.step()
    found = {}
    for name, param in params.items():
        found[name, "weight"] = whole(param.detach())
        found[name, "mask"] = whole(optimizer.isolation_mask(param))
        for key, value in optimizer.state_dict()["state"][list(params).index(name)].items():
            if key not in ("isolation_mask", "persistent_mask"):
                found[name, key] = whole(value)
    report = optimizer.isolation_report()
    found["report"] = None if report is None else report.as_dict()
    return found


def options_of(case: str) -> tuple[torch.dtype, dict]:
    return getattr(torch, case.partition(",")[0]), OPTIONS[case]


def alone(case: str, backend: str) -> dict:
    dtype, options = options_of(case)
    return train(
        {name: nn.Parameter(one) for name, one in weights(dtype).items()}, lambda grad: grad, backend, options
    )


def sharded(rank: int, layout: str, case: str, backend: str, steps: int = 7) -> dict:
    shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", shape)
    dtype, options = options_of(case)

    def place(tensor):
        return cut(tensor, mesh, placements(tensor.ndim))

    params = {name: nn.Parameter(place(one)) for name, one in weights(dtype).items()}
    return train(params, place, backend, options, steps)


def differing(one: dict, other: dict) -> list:
    assert one.keys() == other.keys()
    return [
        key
        for key, value in one.items()
        if not (torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key])
    ]


# every layout with and without random numbers, every option on the layouts that ask most of it
PAIRS = [(layout, case) for layout in LAYOUTS for case in ("float32", "bfloat16")]
PAIRS += [
    (layout, case)
    for layout in ("FSDP on 3", "HSDP")
    for case in OPTIONS
    if "," in case and "-bit" not in case
]


@pytest.mark.parametrize("layout, case", PAIRS)
def test_a_sharded_run_has_the_bits_of_one_process(layout, case):
    expected = alone(case, "cpu")
    assert (
        0 < expected["report"]["isolated"] and expected["report"]["entered"] != expected["report"]["isolated"]
    )
    for found in on_ranks(int(np.prod(LAYOUTS[layout][0])), sharded, layout, case, "cpu"):
        assert differing(found, expected) == []


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        *(
            (layout, "bfloat16, 8-bit")
            for layout in ("FSDP on 3", "the last dimension on 3", "columns and FSDP")
        ),
        ("columns and FSDP", "bfloat16, 4-bit"),
    ],
)
def test_backends_agree_on_shards_whose_states_are_codes(layout, case):
    """Blocks begin with the shard, random numbers go by places in the whole."""
    n_ranks = int(np.prod(LAYOUTS[layout][0]))
    both = [on_ranks(n_ranks, sharded, layout, case, backend) for backend in ("cpu", "reference")]
    for mine, theirs in zip(*both):
        assert differing(mine, theirs) == []


def test_triton_places_random_numbers_of_scattered_shards():
    layout = "the last dimension on 3"
    both = [on_ranks(3, sharded, layout, "bfloat16", backend, 2) for backend in ("triton", "reference")]
    for mine, theirs in zip(*both):
        assert differing(mine, theirs) == []


def whose_ratio_differs(rank: int) -> str:
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(cut(torch.ones(8), mesh, [Shard(0)]))
    optimizer = MaskedEMAAdamW(
        [("w", param)], backend="cpu", mask_interval=2, isolation_ratio=lambda T: 0.5 - rank * T / 8
    )
    for _ in range(2):
        param.grad = cut(torch.arange(8.0), mesh, [Shard(0)])
        try:
            optimizer.step()
        except ValueError as error:
            return f"{optimizer.param_groups[0]['isolation_step']}: {error}"
    return "went on"


def test_ranks_whose_functions_give_different_values_are_refused():
    for said in on_ranks(2, whose_ratio_differs):
        assert said.startswith("1: ranks disagree on isolation_ratio: 0.5 on rank 0, 0.25 on rank 1")
