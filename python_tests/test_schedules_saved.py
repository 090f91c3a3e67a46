"""What schedules remember: a run stopped and resumed is the whole one, through files, copies and other settings."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from epi_kernels import AdaptiveInterval, AdaptiveRatio, MaskedEMAAdamW
from epi_kernels.optim import schedules
from python_tests.harness import (
    assert_same_run,
    give_gradients,
    make,
    small_model,
    snapshot,
    through_a_file,
    train,
)
from python_tests.schedule_runs import SCHEDULES, held, refreshes


@pytest.fixture(params=["reference", "cpu"])
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("settings", SCHEDULES.values(), ids=SCHEDULES)
def test_a_run_stopped_at_any_step_and_resumed_is_the_whole_one(backend, settings):
    steps = 14
    whole_params = small_model()
    whole = make(whole_params, backend=backend, **settings)
    saved = []
    for number in range(steps):
        saved.append(
            (
                {name: p.detach().clone() for name, p in whole_params.items()},
                through_a_file(whole.state_dict()),
            )
        )
        train(whole, whole_params, range(number, number + 1))
    for number, (weights, state_dict) in enumerate(saved):
        params = {name: torch.nn.Parameter(weight) for name, weight in weights.items()}
        resumed = make(params, backend=backend, **settings)
        resumed.load_state_dict(state_dict)
        train(resumed, params, range(number, steps))
        assert_same_run(resumed, whole)
        assert held(resumed) == held(whole)
        if resumed.isolation_report() is not None:
            assert resumed.isolation_report().as_dict() == whole.isolation_report().as_dict()


@pytest.mark.parametrize("flat", [False, True])
def test_a_schedule_goes_through_a_distributed_checkpoint(tmp_path, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
        runs.append((model, make(dict(model.named_parameters()), **SCHEDULES["both"])))
    (model, optimizer), (other_model, other) = runs
    train(optimizer, dict(model.named_parameters()), 5)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"weights": weights, "state": state}, checkpoint_id=tmp_path, no_dist=True)
    weights, state = get_state_dict(other_model, other, options=options)
    dcp.load({"weights": weights, "state": state}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other_model, other, model_state_dict=weights, optim_state_dict=state, options=options)
    for one, its in runs:
        train(its, dict(one.named_parameters()), range(5, 12))
    assert_same_run(optimizer, other)
    assert held(optimizer) == held(other)


def test_these_runs_do_adapt():
    """Else their resumes would show nothing."""
    for name in ("interval", "ratio", "both"):
        params = small_model()
        reports = refreshes(make(params, **SCHEDULES[name]), params, 14)
        assert len({(report.interval, report.ratio) for report in reports}) > 1, name


@pytest.mark.parametrize("settings", SCHEDULES.values(), ids=SCHEDULES)
def test_a_state_dict_holds_plain_numbers(settings):
    params = small_model()
    optimizer = make(params, **settings)
    train(optimizer, params, 3)
    for group in optimizer.state_dict()["param_groups"]:
        assert all(type(group[key]) in (int, float) for key in schedules.KEYS if key in group)
        assert not any(callable(value) for value in group.values())


def test_constant_settings_remember_nothing():
    params = small_model()
    optimizer = make(params)
    train(optimizer, params, 5)
    assert held(optimizer) == [{}]


@pytest.mark.parametrize("settings", SCHEDULES.values(), ids=SCHEDULES)
def test_copies_go_on_as_the_original(settings):
    params = small_model()
    optimizer = make(params, **settings)
    train(optimizer, params, 5)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    train(optimizer, params, range(5, 11))
    for one in copies:
        (group,) = one.param_groups
        its = dict(zip(group["param_names"], group["params"], strict=True))
        train(one, its, range(5, 11))
        assert_same_run(one, optimizer)
        assert held(one) == held(optimizer)


def test_states_without_a_schedule_load_and_begin_one():
    params = small_model()
    plain = make(params, mask_interval=2)
    train(plain, params, 5)
    adamw = torch.optim.AdamW(list(params.values()))
    give_gradients(params, 5)
    adamw.step()
    settings = {"mask_interval": AdaptiveInterval(3), "isolation_ratio": AdaptiveRatio(0.1), "mask_warmup": 4}
    fresh = held(make(small_model(), **settings))
    for state_dict, due in ((plain.state_dict(), 6), (adamw.state_dict(), 4)):
        own = small_model()
        optimizer = make(own, **settings)
        train(optimizer, own, 11)
        assert held(optimizer) != fresh
        optimizer.load_state_dict(state_dict)
        assert held(optimizer) == fresh
        # what is overdue comes after the next step
        steps = [report.step for report in refreshes(optimizer, own, 4)]
        assert steps[0] == due


def test_constant_settings_leave_a_saved_schedule_out():
    params = small_model()
    optimizer = make(params, **SCHEDULES["both"])
    train(optimizer, params, 5)
    other_params = small_model()
    other = make(other_params, mask_interval=3)
    other.load_state_dict(optimizer.state_dict())
    assert held(other) == [{}]
    assert [report.step for report in refreshes(other, other_params, 5)] == [6, 9]
    groups = [{**group, "params": list(small_model().items())} for group in optimizer.param_groups]
    for group in groups:
        group.pop("param_names")
    assert held(MaskedEMAAdamW(groups)) == [{}]


def test_what_was_saved_under_other_bounds_is_brought_within_these():
    params = small_model()
    optimizer = make(params, mask_interval=AdaptiveInterval(2), isolation_ratio=AdaptiveRatio(0.3))
    train(optimizer, params, 3)
    narrow = make(
        small_model(),
        mask_interval=AdaptiveInterval(5, minimum=4),
        isolation_ratio=AdaptiveRatio(0.1, maximum=0.2),
    )
    narrow.load_state_dict(optimizer.state_dict())
    (now,) = held(narrow)
    assert (now[schedules.INTERVAL_KEY], now[schedules.RATIO_KEY]) == (4, 0.2)
    assert now[schedules.NEXT_KEY] == held(optimizer)[0][schedules.NEXT_KEY]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (schedules.NEXT_KEY, 0), (schedules.NEXT_KEY, "soon"), (schedules.INTERVAL_KEY, 0), (schedules.INTERVAL_KEY, 1.5),
        (schedules.RATIO_KEY, 1.0), (schedules.RATIO_KEY, None), (schedules.LAST_KEY, -2), (schedules.LAST_KEY, None),
    ],
)  # fmt: skip
def test_a_damaged_state_is_refused_whole(key, value):
    params = small_model()
    optimizer = make(params, **SCHEDULES["both"])
    train(optimizer, params, 3)
    damaged = optimizer.state_dict()
    damaged["param_groups"][0][key] = value
    train(optimizer, params, range(3, 5))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"{key} must be"):
        optimizer.load_state_dict(damaged)
    assert snapshot(optimizer) == before


def test_a_shorter_maximum_holds_from_the_load_on():
    """The refresh that was planned under the old bounds does not wait for them."""
    params = [torch.nn.Parameter(torch.ones(20)) for _ in range(2)]

    def steps(optimizer, param, n):
        for _ in range(n):
            param.grad = torch.arange(20.0)
            optimizer.step()

    first = MaskedEMAAdamW([params[0]], isolation_ratio=0.2, mask_interval=AdaptiveInterval(4, maximum=400))
    steps(first, params[0], 30)
    second = MaskedEMAAdamW([params[1]], isolation_ratio=0.2, mask_interval=AdaptiveInterval(4, maximum=5))
    second.load_state_dict(first.state_dict())
    steps(second, params[1], 6)
    assert second.isolation_report() is not None and second.isolation_report().interval <= 5
