"""State dicts that do not fit are refused whole, and a step of another type becomes float32."""

from __future__ import annotations

import copy

import pytest
import torch

from python_tests.harness import (
    assert_same_run,
    make,
    small_model,
    snapshot,
    train,
    with_weights_of,
)


def _truncate(saved, key):
    saved["state"][2][key] = saved["state"][2][key][:-1]


def _replace(saved, key, value):
    saved["state"][2][key] = value


def _keep(saved, *keys):
    saved["state"][2] = {key: saved["state"][2][key] for key in keys}


def _version(saved):
    keys = [key for key in saved["param_groups"][0] if "version" in key]
    assert keys, "a state dict of ours names its version"
    saved["param_groups"][0][keys[0]] = 999


def _torchs(saved, step):
    """As of torch's AdamW, which keeps no T: the largest step is it."""
    for group in saved["param_groups"]:
        del group["isolation_step"]
    _replace(saved, "step", step)


DAMAGE = {
    "step-that-float32-does-not-hold": lambda s: _replace(s, "step", torch.tensor(2**24 + 1)),
    "half-a-step": lambda s: _replace(s, "step", torch.tensor(2.5)),
    "no-number-of-steps": lambda s: _replace(s, "step", float("nan")),
    "torchs-endless-step": lambda s: _torchs(s, torch.tensor(float("inf"))),
    "torchs-step-that-is-no-number": lambda s: _torchs(s, None),
    "truncated-mask": lambda s: _truncate(s, "isolation_mask"),
    "longer-mask": lambda s: _replace(s, "isolation_mask", torch.zeros(9, dtype=torch.uint8)),
    "mask-of-no-bytes": lambda s: _replace(s, "isolation_mask", torch.zeros(0, dtype=torch.uint8)),
    "mask-with-padding": lambda s: s["state"][2]["isolation_mask"].bitwise_or_(128),
    "persistent-with-padding": lambda s: _replace(
        s, "persistent_mask", torch.full_like(s["state"][2]["isolation_mask"], 255)
    ),
    "mask-that-is-no-tensor": lambda s: _replace(s, "isolation_mask", [1]),
    "mask-as-floats": lambda s: _replace(s, "isolation_mask", s["state"][2]["isolation_mask"].float()),
    "truncated-persistent": lambda s: _replace(s, "persistent_mask", torch.zeros(0, dtype=torch.uint8)),
    "moment-of-another-shape": lambda s: _truncate(s, "exp_avg_sq"),
    "importance-of-another-shape": lambda s: _truncate(s, "importance"),
    "no-step": lambda s: s["state"][2].pop("step"),
    "no-first-moment": lambda s: s["state"][2].pop("exp_avg"),
    "no-second-moment": lambda s: s["state"][2].pop("exp_avg_sq"),
    "no-step-nor-moments": lambda s: _keep(s, "isolation_mask", "importance"),
    "unknown-version": _version,
    "version-that-is-true": lambda s: s["param_groups"][0].__setitem__("isolation_version", True),
    "no-betas": lambda s: s["param_groups"][0].pop("betas"),
    "foreign-names": lambda s: s["param_groups"][0]["param_names"].__setitem__(3, "other"),
    "fewer-parameters": lambda s: (
        s["param_groups"][0]["params"].pop(),
        s["param_groups"][0]["param_names"].pop(),
    ),
    "more-groups": lambda s: s["param_groups"].append(dict(s["param_groups"][0], params=[])),
    "unlisted-state": lambda s: s["state"].__setitem__(17, s["state"][0]),
    "bad-hyper-parameter": lambda s: s["param_groups"][0].__setitem__("lr", -1.0),
    "no-groups": lambda s: s.pop("param_groups"),
    "no-state": lambda s: s.pop("state"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("trained", [0, 3])
def test_state_dict_that_does_not_fit_is_refused_whole(damage: str, trained: int):
    """The damage is in the third parameter: the first two must not have been loaded either."""
    source_params = small_model(seed=1)
    source = make(source_params, importance_beta=0.9)
    train(source, source_params, 5)
    saved = copy.deepcopy(source.state_dict())
    DAMAGE[damage](saved)
    params = small_model()
    optimizer = make(params, importance_beta=0.9)
    train(optimizer, params, trained)
    before, report = snapshot(optimizer), optimizer.isolation_report()
    with pytest.raises((ValueError, KeyError, TypeError)):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before and optimizer.isolation_report() is report
    train(optimizer, params, range(trained, trained + 2))  # and it still works


@pytest.mark.parametrize("torchs", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64])
def test_a_step_of_another_type_becomes_float32(dtype: torch.dtype, torchs: bool):
    params = small_model(torch.bfloat16)
    optimizer = make(params)
    train(optimizer, params, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].to(dtype)
    if torchs:
        _torchs(saved, saved["state"][2]["step"])
    other_params = with_weights_of(params, dtype=torch.bfloat16)
    other = make(other_params)
    other.load_state_dict(saved)
    assert all(state["step"].dtype == torch.float32 for state in other.state.values())
    for one, its in ((optimizer, params), (other, other_params)):
        train(one, its, range(3, 6))
    assert_same_run(other, optimizer)


@pytest.mark.parametrize("step", [float("nan"), None, torch.tensor(2**24 + 1)])
def test_a_refused_step_is_named_with_its_state(step):
    params = small_model()
    optimizer = make(params)
    train(optimizer, params, 3)
    for damage in (_torchs, lambda saved, value: _replace(saved, "step", value)):
        saved = copy.deepcopy(optimizer.state_dict())
        damage(saved, step)
        with pytest.raises(ValueError, match="state .*: step must be"):
            optimizer.load_state_dict(saved)
