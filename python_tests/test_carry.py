"""carry_importance: a new stage starts from what an earlier one learned to be important."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from python_tests.harness import make, small_model, snapshot, tensor_bytes, train


def trained_source(kind: str, params: dict, steps: int = 5):
    if kind == "adamw":
        source = torch.optim.AdamW(params.items())
    else:
        source = make(params, importance_beta=0.5 if kind == "own" else None)
    train(source, params, steps)
    return source


SOURCES = ("shared", "own", "adamw")


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("as_dict", [False, True])
def test_into_a_shared_importance(kind: str, as_dict: bool):
    """The source's own importance if it has one, else exp_avg_sq, with the step; exp_avg zero, T 0."""
    old = small_model()
    source = trained_source(kind, old)
    new = small_model(seed=1)
    weights = [tensor_bytes(p) for p in new.values()]
    optimizer = make(new)
    train(optimizer, new, 0)
    optimizer.carry_importance(source.state_dict() if as_dict else source)
    assert [tensor_bytes(p) for p in new.values()] == weights
    key = "importance" if kind == "own" else "exp_avg_sq"
    for name, p in new.items():
        state = optimizer.state[p]
        assert torch.equal(state["exp_avg_sq"], source.state[old[name]][key])
        assert state["step"].item() == 5 and state["step"].dtype == torch.float32
        assert not state["exp_avg"].any() and "importance" not in state
        assert state["exp_avg_sq"].data_ptr() != source.state[old[name]][key].data_ptr()
    assert optimizer.param_groups[0]["isolation_step"] == 0
    assert optimizer.isolation_report() is None  # it does not refresh
    assert not any(optimizer.isolation_mask(p).any() for p in new.values())


@pytest.mark.parametrize("kind", SOURCES)
def test_into_an_own_importance(kind: str):
    """That tensor alone: the second moment starts as a new one does, and so does the step."""
    old, new = small_model(), small_model(seed=1)
    source = trained_source(kind, old)
    optimizer = make(new, importance_beta=0.9)
    optimizer.carry_importance(source)
    key = "importance" if kind == "own" else "exp_avg_sq"
    for name, p in new.items():
        state = optimizer.state[p]
        assert torch.equal(state["importance"], source.state[old[name]][key])
        assert state["step"].item() == 0
        assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()


@pytest.mark.parametrize("own", [False, True])
def test_refresh_after_it_protects_from_the_first_step_on(own: bool):
    old = small_model()
    source = trained_source("shared", old)
    new = small_model(seed=1)
    optimizer = make(new, importance_beta=0.9 if own else None, mask_interval=100)
    optimizer.carry_importance(source)
    report = optimizer.refresh_isolation_mask()
    assert report.step == 0 and report.isolated == math.floor(0.2 * sum(p.numel() for p in new.values()))
    expected = make(old, mask_interval=100)
    expected.load_state_dict(source.state_dict())
    expected.refresh_isolation_mask()
    before = {name: p.detach().clone() for name, p in new.items()}
    for name, p in new.items():
        assert torch.equal(optimizer.isolation_mask(p), expected.isolation_mask(old[name]))
    train(optimizer, new, 3)
    for name, p in new.items():
        assert torch.equal(p == before[name], optimizer.isolation_mask(p))


def test_over_a_run_already_begun():
    """What the optimizer had collected itself is gone; schedule and step start again."""
    old, new = small_model(), small_model(seed=1)
    source = trained_source("shared", old)
    optimizer = make(new)
    train(optimizer, new, 3)
    optimizer.carry_importance(source)
    fresh_params = small_model(seed=1)
    fresh = make(fresh_params)
    fresh.carry_importance(source)
    for p, q in zip(new.values(), fresh_params.values(), strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[p][key], fresh.state[q][key])
    assert optimizer.param_groups[0]["isolation_step"] == 0


def test_by_name_whatever_the_order():
    old = small_model()
    source = trained_source("shared", old)
    new = dict(reversed(small_model(seed=1).items()))
    optimizer = make(new)
    optimizer.carry_importance(source)
    for name, p in new.items():
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], source.state[old[name]]["exp_avg_sq"])


@pytest.mark.parametrize("named_side", ["neither", "source", "target"])
def test_by_position_where_a_side_has_no_names(named_side: str):
    old, new = small_model(), small_model(seed=1)
    source = make(old, named=named_side == "source")
    train(source, old, 2)
    optimizer = make(new, named=named_side == "target")
    optimizer.carry_importance(source)
    for p, q in zip(new.values(), old.values(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], source.state[q]["exp_avg_sq"])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_into_another_state_dtype(state_dtype: torch.dtype):
    """The dtype stays what this optimizer was told."""
    old, new = small_model(torch.bfloat16), small_model(seed=1)
    source = trained_source("shared", old)
    optimizer = make(new, state_dtype=state_dtype)
    optimizer.carry_importance(source)
    for p, q in zip(new.values(), old.values(), strict=True):
        carried = optimizer.state[p]["exp_avg_sq"]
        assert carried.dtype == state_dtype
        assert torch.equal(carried.float(), source.state[q]["exp_avg_sq"].float())


def _without(params: dict, name: str) -> dict:
    return {key: p for key, p in params.items() if key != name}


@pytest.mark.parametrize("trained", [0, 3])
@pytest.mark.parametrize("problem", ["missing-name", "shape", "count", "not-an-optimizer", "sgd"])
def test_all_or_nothing(problem: str, trained: int):
    """One parameter that does not match, the last one: none is carried."""
    old, new = small_model(), small_model(seed=1)
    named = problem != "count"
    if problem in ("missing-name", "count"):
        old = _without(old, "scale")
    if problem == "shape":
        old["scale"] = torch.nn.Parameter(torch.ones(2))
    source = make(old, named=named)
    if problem == "sgd":
        source = torch.optim.SGD(old.items(), lr=0.1, momentum=0.9)
    train(source, old, 2)
    given = {"not-an-optimizer": "model.safetensors"}.get(problem, source)
    optimizer = make(new, named=named)
    train(optimizer, new, trained)
    before, report = snapshot(optimizer), optimizer.isolation_report()
    with pytest.raises((ValueError, TypeError)):
        optimizer.carry_importance(given)
    assert snapshot(optimizer) == before and optimizer.isolation_report() is report


def test_source_is_left_alone():
    old, new = small_model(), small_model(seed=1)
    source = trained_source("shared", old)
    before, saved = snapshot(source), copy.deepcopy(source.state_dict())
    optimizer = make(new)
    optimizer.carry_importance(saved)
    train(optimizer, new, 3)
    assert snapshot(source) == before
    assert repr(saved) == repr(source.state_dict())
