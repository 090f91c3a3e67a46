"""Parameters that change places in a group, and others that take theirs: each keeps the state that is its own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from epi_kernels import MaskedEMAAdamW


def made(shapes=((8, 8), (8, 8), (5,)), dtype=torch.float32, **options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    named = [(f"p{number}", param) for number, param in enumerate(params)]
    optimizer = MaskedEMAAdamW(named, lr=1e-2, isolation_ratio=0.2, mask_interval=2, **options)
    return params, optimizer


def trained(params, optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        for number, param in enumerate(params):
            generator = torch.Generator().manual_seed(10 * step + number)
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def reordered(optimizer, order) -> None:
    group = optimizer.param_groups[0]
    for key in ("params", "param_names"):
        group[key][:] = [group[key][number] for number in order]


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0)], ids=["equal shapes", "other shapes"])
def test_state_stays_with_parameters_that_change_places(order):
    """As in torch, whose state goes by the parameter."""
    (plain, expected), (moved, optimizer) = made(), made()
    trained(plain, expected, 0, 3)
    trained(moved, optimizer, 0, 3)
    reordered(optimizer, order)
    trained(plain, expected, 3, 6)
    trained(moved, optimizer, 3, 6)
    assert len(optimizer.state) == len(moved)
    for one, other in zip(plain, moved, strict=True):
        assert torch.equal(one, other)
        assert all(
            torch.equal(value, optimizer.state[other][key]) for key, value in expected.state[one].items()
        )


def replaced(params, optimizer) -> None:
    params[0] = nn.Parameter(params[0].detach().clone())
    optimizer.param_groups[0]["params"][0] = params[0]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_the_state_of_a_parameter_that_was_replaced_before(copied):
    params, optimizer = made()
    trained(params, optimizer, 0, 3)
    replaced(params, optimizer)
    twins, twin = copied((params, optimizer))
    trained(params, optimizer, 3, 6)
    trained(twins, twin, 3, 6)
    assert set(twin.state_dict()["state"]) == {0, 1, 2}
    assert all(map(torch.equal, params, twins))
    assert all(float(twin.state[param]["step"]) == 6 for param in twins)


def test_the_master_weight_of_a_successor_has_its_correction():
    params, optimizer = made(dtype=torch.bfloat16, master_weight_bits=32)
    trained(params, optimizer, 0, 3)
    expected = optimizer.master_weight(params[0])
    assert not torch.equal(expected, params[0].float())
    replaced(params, optimizer)
    assert torch.equal(optimizer.master_weight(params[0]), expected)
