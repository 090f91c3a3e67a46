"""A plan is kept from step to step, and dropped when anything it relied on has changed: the bits never tell."""

from __future__ import annotations

import gc
import math
import warnings
import weakref

import pytest
import torch

from epi_kernels import MaskedEMAAdamW
from python_tests.harness import assert_same_run, give_gradients, make, small_model, train


def grow(optimizer, params):
    extra = torch.nn.Parameter(torch.linspace(-1, 1, 11))
    params["extra"] = extra
    optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.5})


def move_state_in_place(optimizer, params):
    """As offloading does: the tensor stays the same object, its memory is another."""
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


def replace_state(optimizer, params):
    for state in optimizer.state.values():
        for key in list(state):
            state[key] = state[key].clone()


def move_weights(optimizer, params):
    for p in params.values():
        p.data = p.data.clone()


def transpose_a_weight_in_place(optimizer, params):
    """The same place, the same shape, another order."""
    params["block.weight"].data = params["block.weight"].data.t()


def reload_state(optimizer, params):
    optimizer.load_state_dict(optimizer.state_dict())


def keep_something_else_there(optimizer, params):
    optimizer.state[params["embed"]]["note"] = "mine"


def new_lr(optimizer, params):
    optimizer.param_groups[0]["lr"] = 0.3


def new_betas(optimizer, params):
    optimizer.param_groups[0]["betas"] = (0.5, 0.9)


def maximize(optimizer, params):
    optimizer.param_groups[0]["maximize"] = True


def isolate_no_more(optimizer, params):
    optimizer.param_groups[0]["isolate"] = False


def install_mask(optimizer, params):
    optimizer.set_isolation_mask(params["embed"], torch.ones_like(params["embed"], dtype=torch.bool))


# (what happens between two steps, whether it changes what the run computes)
CHANGES = [
    (move_state_in_place, False),
    (replace_state, False),
    (move_weights, False),
    (transpose_a_weight_in_place, True),
    (reload_state, False),
    (keep_something_else_there, False),
    (grow, True),
    (new_lr, True),
    (new_betas, True),
    (maximize, True),
    (isolate_no_more, True),
    (install_mask, True),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("change", "matters"), CHANGES, ids=lambda value: getattr(value, "__name__", None))
def test_what_changes_between_steps_is_noticed(change, matters, backend):
    """The same run with a plan made anew at every step."""
    runs = []
    for keep in (True, False):
        params = small_model(torch.bfloat16)
        optimizer = make(params, backend=backend, mask_interval=3)
        for number in range(8):
            if number == 4:
                change(optimizer, params)
            give_gradients(params, number)
            if not keep:
                optimizer._plan = None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nothing is left to isolate
                optimizer.step()
        runs.append(optimizer)
    kept, fresh = runs
    for optimizer in (kept, fresh):
        optimizer.state[optimizer.param_groups[0]["params"][0]].pop("note", None)
    assert_same_run(kept, fresh)
    if matters:
        params = small_model(torch.bfloat16)
        unchanged = make(params, backend=backend, mask_interval=3)
        train(unchanged, params, 8)
        same = all(map(torch.equal, params.values(), kept.param_groups[0]["params"]))
        assert not same or len(kept.param_groups) > 1


def test_a_plan_is_kept_while_nothing_changes():
    params = small_model()
    optimizer = make(params, backend="cpu", mask_interval=3)
    train(optimizer, params, 1)
    plan = optimizer._plan
    train(optimizer, params, 6)  # new gradients and two refreshes
    assert plan is not None and optimizer._plan is plan
    optimizer.param_groups[0]["lr"] = 0.5
    train(optimizer, params, 1)
    assert optimizer._plan is plan


@pytest.mark.parametrize("kind", ["weight", "exp_avg", "exp_avg_sq"])
def test_what_shrinks_in_place_is_refused(kind):
    """A plan that went by addresses would read and write past the end."""
    p = torch.nn.Parameter(torch.ones(5000))
    optimizer = MaskedEMAAdamW([p], backend="cpu")
    p.grad = torch.ones(5000)
    optimizer.step()
    tensor = p if kind == "weight" else optimizer.state[p][kind]
    whole = tensor.data
    tensor.data = whole[:2500]
    before = whole.clone()
    with pytest.raises(RuntimeError, match=r"\[2500\]"):
        optimizer.step()
    assert torch.equal(whole, before)


def test_replaced_state_is_released():
    params = small_model()
    optimizer = make(params, backend="cpu")
    for replace in (optimizer.load_state_dict, optimizer.carry_importance):
        train(optimizer, params, 1)
        old = [weakref.ref(state["exp_avg_sq"]) for state in optimizer.state.values()]
        replace(optimizer.state_dict())
        gc.collect()
        assert not any(ref() is not None for ref in old)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_parameters_that_come_and_go(backend):
    """Every step another set of parameters has gradients; each counts its own steps."""
    runs = []
    for keep in (True, False):
        params = small_model()
        optimizer = make(params, backend=backend, mask_interval=4)
        for number in range(12):
            give_gradients(params, number)
            for i, p in enumerate(params.values()):
                if (number >> i) % 3 == 0:
                    p.grad = None
            if not keep:
                optimizer._plan = None
            optimizer.step()
        runs.append(optimizer)
    assert_same_run(*runs)
    assert len({state["step"].item() for state in runs[0].state.values()}) > 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_are_not_kept_alive(backend):
    params = small_model()
    optimizer = make(params, backend=backend, mask_interval=1)
    train(optimizer, params, 1)
    alive = [weakref.ref(p.grad) for p in params.values()]
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    assert not any(ref() for ref in alive)


def test_step_tensors_are_plain_scalars_to_everybody_else():
    params = small_model()
    optimizer = make(params, backend="cpu")
    train(optimizer, params, 3)
    steps = [state["step"] for state in optimizer.state.values()]
    assert all(step.shape == () and step.dtype == torch.float32 and step.item() == 3 for step in steps)
    steps[0].add_(4)  # somebody counts on: the optimizer goes on from there
    train(optimizer, params, 1)
    assert [int(state["step"]) for state in optimizer.state.values()] == [8, 4, 4, 4]


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "fast"])
def test_a_schedule_that_sets_nonsense_changes_nothing(value):
    params = small_model()
    optimizer = make(params, backend="cpu")
    train(optimizer, params, 2)
    before = repr(optimizer.state_dict()), [p.detach().clone() for p in params.values()]
    good, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], value
    with pytest.raises(ValueError, match="lr must be"):
        train(optimizer, params, 1)
    optimizer.param_groups[0]["lr"] = good
    assert repr(optimizer.state_dict()) == before[0]
    assert all(torch.equal(p, b) for p, b in zip(params.values(), before[1], strict=True))


def test_a_first_step_that_is_refused_leaves_no_state():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = MaskedEMAAdamW([p])
    p.grad = torch.ones(1).expand(4)
    optimizer.grad_scale = torch.tensor(2.0)
    with pytest.raises(RuntimeError, match="expanded"):
        optimizer.step()
    assert not optimizer.state and torch.equal(p, torch.ones(4))
