"""isolate_rows: whole rows of the highest mean importance for good, and cores that are not of whole rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from epi_kernels.isolation import IsolationError, MemoryCore, freeze, isolate_rows
from epi_kernels.optim.compact import RUNS_KEY
from python_tests.harness import snapshot
from python_tests.row_runs import SHAPES, fresh, go_on, masks, model

MATRICES = ("w", "tail", "gone")
N = sum(math.prod(SHAPES[name]) for name in MATRICES)


def stage(granularity: str = "row", **options):
    """A model in training whose rows matter more, the later they come."""
    params = model()
    optimizer = fresh(params, granularity, isolation_ratio=0.0, **options)
    for number in range(3):
        for p in params.values():
            generator = torch.Generator().manual_seed(number)
            scale = torch.linspace(0.1, 1, p.shape[0]).view(-1, *[1] * (p.ndim - 1))
            p.grad = torch.randn(p.shape, generator=generator) * scale
        optimizer.step()
    return params, optimizer


def expected(optimizer, share: float, size: int | None = None) -> dict[str, np.ndarray]:
    """From the docstring: means of normalised importances, sorted, until the next row would be too much."""
    found = []
    for number, name in enumerate(MATRICES):
        u = optimizer.state_dict()["state"][number]["exp_avg_sq"].double().numpy()
        u = (u.reshape(-1) - u.min()) / (u.max() - u.min())
        step = size or SHAPES[name][1]
        found += [
            (u[at : at + step].mean(), name, at, min(step, u.size - at)) for at in range(0, u.size, step)
        ]
    taken = {name: np.zeros(math.prod(SHAPES[name]), dtype=bool) for name in MATRICES}
    room = math.floor(share * N)
    for _, name, at, count in sorted(found, key=lambda one: -one[0]):
        room -= count
        if room < 0:
            break
        taken[name][at : at + count] = True
    return taken


@pytest.mark.parametrize(("granularity", "size"), [("row", None), ("block", 4096), ("element", None)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_highest_rows_of_all_parameters(granularity: str, size: int | None, share: float):
    params, optimizer = stage(granularity)
    wanted, before = expected(optimizer, share, size), optimizer.state_bytes()["total"]
    assert isolate_rows(optimizer, share) == sum(mask.sum() for mask in wanted.values()) <= share * N
    for name, mask in wanted.items():
        assert np.array_equal(optimizer.isolation_mask(params[name]).numpy().reshape(-1), mask), name
    assert not optimizer.isolation_mask(params["bias"]).any(), "a vector has no rows"
    if granularity == "row" and share > 0.1:
        assert optimizer.state_bytes()["total"] < (1.2 - share) * before
    frozen = params["w"].detach().clone()
    go_on(params, optimizer, range(3, 5))
    assert np.array_equal((params["w"] == frozen).numpy().reshape(-1), wanted["w"])


def test_what_is_isolated_already_stays_and_counts():
    params, optimizer = stage()
    isolate_rows(optimizer, 0.3)
    first = {name: optimizer.isolation_mask(params[name]) for name in MATRICES}
    go_on(params, optimizer, range(3, 5))
    assert isolate_rows(optimizer, 0.0) == sum(int(mask.sum()) for mask in first.values())
    count = isolate_rows(optimizer, 0.6)
    second = {name: optimizer.isolation_mask(params[name]) for name in MATRICES}
    assert 0.55 * N < count <= 0.6 * N
    for name in MATRICES:
        assert not (first[name] & ~second[name]).any(), name


def test_what_never_mattered_is_not_isolated():
    params, optimizer = stage()
    for state in optimizer.state.values():
        state["exp_avg_sq"].zero_()
    state = optimizer.state[params["w"]]
    state["exp_avg_sq"][3] = 1.0
    state["exp_avg_sq"][4, 5] = torch.inf
    assert isolate_rows(optimizer, 1.0) == 96
    assert optimizer.isolation_mask(params["w"])[3].all()


def test_refusals():
    params = model()
    optimizer = fresh(params)
    with pytest.raises(IsolationError, match="no importance yet"):
        isolate_rows(optimizer, 0.5)
    with pytest.raises(IsolationError, match="share is 1.5"):
        isolate_rows(optimizer, 1.5)
    with pytest.raises(TypeError, match="got AdamW"):
        isolate_rows(torch.optim.AdamW(params.values()), 0.5)


def test_cores_of_whole_rows_freeze_and_others_change_nothing():
    params, optimizer = stage()
    rows = masks() | {"bias": torch.zeros(SHAPES["bias"], dtype=torch.bool)}
    parts = {name: mask.clone() for name, mask in rows.items()}
    parts["gone"][5, 7] = False
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="gone: a persistent mask .* is of whole rows"):
        freeze(optimizer, [MemoryCore.from_bools(parts)])
    assert snapshot(optimizer) == before
    assert freeze(optimizer, [MemoryCore.from_bools(rows)]) == sum(int(mask.sum()) for mask in rows.values())
    assert RUNS_KEY in optimizer.state[params["w"]]
    assert freeze(optimizer, []) == 0
    assert RUNS_KEY not in optimizer.state[params["w"]] and not optimizer.isolation_mask(params["w"]).any()
