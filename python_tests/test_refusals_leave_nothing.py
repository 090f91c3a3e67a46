"""What is refused changes nothing: no weight moves, no state appears, T stays."""

from __future__ import annotations

import copy

import pytest
import torch

from epi_kernels import MaskedEMAAdamW


def param(n: int = 8) -> torch.nn.Parameter:
    made = torch.nn.Parameter(torch.ones(n))
    made.grad = torch.ones(n)
    return made


def step_of(optimizer: MaskedEMAAdamW) -> int:
    return optimizer.param_groups[0]["isolation_step"]


@pytest.mark.parametrize("step", [-4.0, float("nan"), float("inf"), 2.5, [1.0, 2.0], "3", None])
def test_a_step_that_is_no_count_is_neither_carried_nor_loaded(step):
    source = MaskedEMAAdamW([param()])
    source.step()
    saved = copy.deepcopy(source.state_dict())
    saved["state"][0]["step"] = torch.tensor(step) if isinstance(step, (float, list)) else step
    target = MaskedEMAAdamW([param()])
    for call in (target.carry_importance, target.load_state_dict):
        with pytest.raises(ValueError, match="step must be one whole number >= 0"):
            call(saved)
    assert not target.state


def test_a_refresh_that_cannot_be_is_refused_before_the_step():
    moves, resized = param(), param(12)
    optimizer = MaskedEMAAdamW([("a", moves), ("b", resized)], mask_interval=2, isolation_ratio=0.3)
    optimizer.step()
    resized.grad, resized.data = None, torch.ones(20)
    before = moves.detach().clone()
    with pytest.raises(RuntimeError, match="does not fit"):
        optimizer.step()
    assert torch.equal(moves, before) and step_of(optimizer) == 1


@pytest.mark.parametrize("option", ["isolate", "maximize"])
@pytest.mark.parametrize("value", ["no", None, 2.5])
def test_a_switch_set_live_is_checked_before_the_step(option, value):
    first = param()
    optimizer = MaskedEMAAdamW([first], mask_interval=2, isolation_ratio=0.3)
    for taken in range(2):
        optimizer.param_groups[0][option] = value
        before, states = first.detach().clone(), len(optimizer.state)
        with pytest.raises(ValueError, match=f"{option} must be True or False"):
            optimizer.step()
        assert torch.equal(first, before) and step_of(optimizer) == taken and len(optimizer.state) == states
        optimizer.param_groups[0][option] = option == "isolate"
        optimizer.step()


def test_a_layer_key_that_fails_leaves_no_state():
    optimizer = MaskedEMAAdamW([("a", param())], mask_interval=1, layer_key=lambda name: {}[name])
    with pytest.raises(KeyError):
        optimizer.step()
    assert not optimizer.state and step_of(optimizer) == 0


def test_an_expanded_parameter_is_refused_with_what_to_do():
    expanded = torch.nn.Parameter(torch.ones(1).expand(8))
    expanded.grad = torch.ones(8)
    optimizer = MaskedEMAAdamW([expanded])
    with pytest.raises(RuntimeError, match=r"expanded.*\.contiguous\(\)"):
        optimizer.step()
    assert not optimizer.state


def test_a_sparse_mask_is_refused():
    first = param()
    optimizer = MaskedEMAAdamW([first])
    with pytest.raises(TypeError, match="dense bool"):
        optimizer.set_isolation_mask(first, torch.zeros(8, dtype=torch.bool).to_sparse())
    assert not optimizer.state


@pytest.mark.parametrize("group", [None, {}, [1]])
def test_a_group_that_is_none_is_refused(group):
    with pytest.raises(ValueError, match="no dict with 'params'"):
        MaskedEMAAdamW([param()]).load_state_dict({"state": {}, "param_groups": [group]})


@pytest.mark.parametrize("spoil", [torch.Tensor.to_sparse, lambda value: value.to("meta")])
def test_a_moment_without_values_is_refused(spoil):
    source = MaskedEMAAdamW([param()])
    source.step()
    saved = copy.deepcopy(source.state_dict())
    saved["state"][0]["exp_avg"] = spoil(saved["state"][0]["exp_avg"])
    with pytest.raises(ValueError, match="exp_avg must be floats"):
        MaskedEMAAdamW([param()]).load_state_dict(saved)


def test_an_importance_that_is_shared_by_now_is_what_is_carried():
    source = MaskedEMAAdamW([first := param()], importance_beta=0.5)
    source.step()
    source.param_groups[0]["importance_beta"] = None
    source.step()
    target = MaskedEMAAdamW([second := param()])
    target.carry_importance(source)
    assert torch.equal(target.state[second]["exp_avg_sq"], source.state[first]["exp_avg_sq"])
