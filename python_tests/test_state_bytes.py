"""state_bytes(): what the optimizer owns, and the memory table's figures."""

from __future__ import annotations

import pytest
import torch

from python_tests.harness import make, small_model, train

KINDS = ("exp_avg", "exp_avg_sq", "importance", "isolation_mask", "persistent_mask", "other", "total")
N = 80_000  # a multiple of 64: no padding bits, whole blocks

# (weights, arguments) -> bytes per parameter
TABLE = [
    (torch.float32, {}, 8.125),
    (torch.bfloat16, {}, 4.125),
    (torch.float32, {"isolation_ratio": 0.0}, 8.0),
    (torch.bfloat16, {"isolation_ratio": 0.0}, 4.0),
    (torch.float32, {"state_dtype": torch.bfloat16}, 4.125),
    (torch.bfloat16, {"state_dtype": torch.float32}, 8.125),
    (torch.float32, {"importance_beta": 0.9}, 12.125),
    (torch.bfloat16, {"importance_beta": 0.9}, 8.125),
    (torch.bfloat16, {"importance_beta": 0.9, "importance_dtype": torch.bfloat16}, 6.125),
    (torch.float32, {"importance_beta": 0.999}, 8.125),  # beta2: shared
    (torch.float32, {"state_dtype": "int8"}, 2.15625),  # two codes, two scales a block of 64, the mask
    (torch.bfloat16, {"state_dtype": "int8"}, 2.15625),
    (torch.bfloat16, {"state_dtype": "int8", "importance_beta": 0.9, "importance_dtype": "int8"}, 3.171875),
    (torch.bfloat16, {"importance_beta": 0.9, "importance_dtype": "int8"}, 5.140625),
    (torch.bfloat16, {"state_dtype": "int8", "master_weight_bits": 24}, 3.15625),
    (torch.bfloat16, {"state_dtype": "int8", "master_weight_bits": 32}, 4.15625),
    (
        torch.float32,
        {"state_dtype": "int4"},
        1.1875,
    ),  # two codes, two scales of two bytes a block of 64, the mask
    (torch.bfloat16, {"state_dtype": "int4", "master_weight_bits": 24}, 2.1875),
    (torch.float32, {"master_weight_bits": 32}, 8.125),  # float32 weights have every bit
]


@pytest.mark.parametrize(("dtype", "arguments", "per_parameter"), TABLE)
@pytest.mark.parametrize("persistent", [False, True])
def test_bytes_per_parameter(dtype, arguments, per_parameter, persistent: bool):
    p = torch.nn.Parameter(torch.ones(N, dtype=dtype))
    optimizer = make({"w": p}, **arguments)
    if persistent:
        optimizer.set_isolation_mask(p, torch.ones(N, dtype=torch.bool), persistent=True)
        # The bits selected for good, and the mask they act through where there would be none.
        per_parameter += 0.125 + (0.125 if arguments.get("isolation_ratio") == 0.0 else 0.0)
    train(optimizer, {"w": p}, 3)
    sizes = optimizer.state_bytes()
    assert sizes["total"] - sizes["other"] == per_parameter * N
    assert sizes["other"] <= 8  # the step


def test_bytes_are_those_of_the_tensors():
    params = small_model(torch.bfloat16)
    optimizer = make(params, importance_beta=0.9)
    optimizer.set_isolation_mask(params["embed"], torch.ones(19, 5, dtype=torch.bool), persistent=True)
    empty = make(small_model())
    assert empty.state_bytes() == dict.fromkeys(KINDS, 0)
    train(optimizer, params, 3)
    sizes = optimizer.state_bytes()
    assert tuple(sizes) == KINDS
    for kind in KINDS[:5]:
        held = [state[kind].untyped_storage().nbytes() for state in optimizer.state.values() if kind in state]
        assert sizes[kind] == sum(held), kind
    assert sizes["other"] == 4 * len(params)
    assert sizes["total"] == sum(sizes[kind] for kind in KINDS[:-1])


def test_corrections_are_listed_where_there_are_any():
    params = small_model(torch.bfloat16)
    optimizer = make(params, master_weight_bits=24)
    train(optimizer, params, 1)
    sizes = optimizer.state_bytes()
    assert tuple(sizes) == (*KINDS[:5], "weight_correction", *KINDS[5:])
    assert sizes["weight_correction"] == sum(p.numel() for p in params.values())
    assert sizes["total"] == sum(size for kind, size in sizes.items() if kind != "total")


def test_never_more_than_an_eighth_of_a_byte_above_adamw():
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.nn.Parameter(torch.ones(N, dtype=dtype))
        adamw, optimizer = torch.optim.AdamW([p]), make({"w": p})
        train(adamw, {"w": p}, 1)
        train(optimizer, {"w": p}, 1)
        theirs = sum(x.numel() * x.element_size() for x in adamw.state[p].values())
        assert optimizer.state_bytes()["total"] - theirs == N // 8


def test_small_tensors_keep_float32_states():
    small, large = torch.nn.Parameter(torch.ones(4095)), torch.nn.Parameter(torch.ones(64, 64))
    optimizer = make({"small": small, "large": large}, state_dtype="int8")
    train(optimizer, {"small": small, "large": large}, 1)
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32
    assert "exp_avg_scale" not in optimizer.state[small]
    assert optimizer.state[large]["exp_avg"].dtype == torch.uint8
    assert optimizer.state_bytes()["exp_avg"] == 4 * 4095 + 4096 + 64
