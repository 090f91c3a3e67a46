"""Schedules of the mask interval and the isolation ratio: functions of T, and those that follow the masks' drift."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from epi_kernels import AdaptiveInterval, AdaptiveRatio, MaskedEMAAdamW
from epi_kernels.optim import schedules
from epi_kernels.policies.schedule import agreement
from python_tests.harness import assert_same_run, give_gradients, make, small_model, snapshot, train

N = 152  # elements of small_model


def slower(T: int) -> int:
    return 1 + T // 3


def wave(T: int) -> float:
    return (0.0, 0.1, 0.45, 0.2)[T % 4]


@pytest.fixture(params=["reference", "cpu"])
def backend(request) -> str:
    return request.param


def refreshes(optimizer, params, steps, give=give_gradients) -> list:
    """The reports of the refreshes that followed these steps."""
    seen = []
    for number in range(steps):
        give(params, number)
        last = optimizer.isolation_report()
        optimizer.step()
        if optimizer.isolation_report() is not last:
            seen.append(optimizer.isolation_report())
    return seen


def the_same(params, number):
    """Importances whose order never changes."""
    give_gradients(params, 0)


def disjoint(params, number):
    """Importances that share nothing with those of the step before, where no moment remembers (betas of 0)."""
    offset = 0
    for p in params.values():
        place = torch.arange(offset, offset + p.numel()).view(p.shape)
        p.grad = torch.where(place % 4 == number % 4, 1.0 + place / N, 0.0)
        offset += p.numel()


def held(optimizer) -> list[dict]:
    """What every group remembers of schedules."""
    return [{k: group[k] for k in schedules.KEYS if k in group} for group in optimizer.param_groups]


# --- functions of T -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [None, 0, 1, 4])
@pytest.mark.parametrize("interval", [slower, lambda T: 3 if T < 9 else 2, lambda T: 100])
def test_an_interval_of_T_says_how_many_steps_later_the_next_refresh_is(backend, interval, warmup):
    expected, following = [], warmup or interval(0)
    while following <= 20:
        expected.append((following, interval(following)))
        following += interval(following)
    params = small_model()
    optimizer = make(params, backend=backend, mask_interval=interval, mask_warmup=warmup)
    assert [(report.step, report.interval) for report in refreshes(optimizer, params, 20)] == expected


@pytest.mark.parametrize("warmup", [None, 0, 1, 5])
def test_functions_that_never_change_are_the_constants(backend, warmup):
    constant = {"mask_interval": 3, "isolation_ratio": 0.2}
    runs = []
    for settings in (constant, {name: lambda T, value=value: value for name, value in constant.items()}):
        params = small_model()
        optimizer = make(params, backend=backend, mask_warmup=warmup, **settings)
        runs.append((optimizer, [report.as_dict() for report in refreshes(optimizer, params, 14)]))
    assert runs[0][1] == runs[1][1] and runs[0][1][0]["interval"] == 3
    assert_same_run(runs[0][0], runs[1][0])


def test_a_ratio_of_T_is_read_at_every_refresh(backend):
    params = small_model()
    optimizer = make(params, backend=backend, mask_interval=1, isolation_ratio=wave)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a ratio of 0 is what was asked for
        reports = refreshes(optimizer, params, 9)
    for report in reports:
        assert report.ratio == wave(report.step)
        assert report.isolated == math.floor(report.ratio * N) + report.ties
    assert [report.step for report in reports] == list(range(1, 10))
    assert sum(int(optimizer.isolation_mask(p).sum()) for p in params.values()) == reports[-1].isolated


def test_state_is_complete_at_the_first_step_though_the_ratio_is_0(backend):
    params = small_model()
    optimizer = make(params, backend=backend, mask_interval=9, isolation_ratio=wave)
    train(optimizer, params, 1)
    assert all("isolation_mask" in optimizer.state[p] for p in params.values())
    assert optimizer.state_bytes()["isolation_mask"] > 0


def test_a_function_waits_for_no_device():
    """Only what follows the drift reads the figures."""
    for interval, read in ((2, False), (slower, False), (AdaptiveInterval(2), True)):
        params = small_model()
        optimizer = make(params, mask_interval=interval)
        reports = refreshes(optimizer, params, 8)
        assert ["layers" in report.__dict__ for report in reports[1:]] == [read] * (len(reports) - 1)


# --- following the drift ------------------------------------------------------------------------------------


def test_an_interval_lengthens_while_masks_agree(backend):
    params = small_model()
    adaptive = AdaptiveInterval(initial=2, minimum=1, maximum=7)
    optimizer = make(params, backend=backend, mask_interval=adaptive)
    reports = refreshes(optimizer, params, 26, the_same)
    # the first mask has none before it
    assert [(r.step, r.interval) for r in reports] == [(2, 2), (4, 4), (8, 7), (15, 7), (22, 7)]
    assert all(report.jaccard == 1 for report in reports[1:])


def test_an_interval_shortens_where_masks_drift_and_lengthens_where_they_agree(backend):
    params = small_model()
    adaptive = AdaptiveInterval(initial=9, minimum=2, maximum=90)
    optimizer = make(params, backend=backend, mask_interval=adaptive, betas=(0.0, 0.0), mask_warmup=1)
    reports = refreshes(optimizer, params, 22, disjoint)
    assert [(r.step, r.interval) for r in reports] == [(1, 9), (10, 4), (14, 8), (22, 16)]
    assert [report.jaccard for report in reports] == [0, 0, 1, 1]  # every 4 steps the same


def test_an_interval_shortens_to_its_minimum():
    params = small_model()
    adaptive = AdaptiveInterval(initial=9, minimum=2, factor=1.5)
    optimizer = make(params, mask_interval=adaptive, betas=(0.0, 0.0), mask_warmup=1)
    reports = refreshes(optimizer, params, 30, lambda p, number: give_gradients(p, number))
    assert all(report.jaccard < 0.5 for report in reports)
    assert [r.interval for r in reports][:6] == [9, 6, 4, 2, 2, 2]


def test_a_ratio_grows_while_masks_agree(backend):
    params = small_model()
    adaptive = AdaptiveRatio(initial=0.05, minimum=0.02, maximum=0.3)
    optimizer = make(params, backend=backend, mask_interval=2, isolation_ratio=adaptive)
    reports = refreshes(optimizer, params, 12, the_same)
    ratios = [0.05, 0.05, 0.1, 0.2, 0.3, 0.3]  # the second mask is the first that may say something
    assert [report.ratio for report in reports] == ratios
    assert [report.isolated for report in reports] == [math.floor(p * N) for p in ratios]
    assert reports[2].jaccard == 7 / 15  # below `low`, as masks of two sizes must be
    assert {report.interval for report in reports} == {2}


def test_a_ratio_shrinks_while_masks_drift(backend):
    params = small_model()
    adaptive = AdaptiveRatio(initial=0.2, minimum=0.06)
    optimizer = make(params, backend=backend, mask_interval=1, isolation_ratio=adaptive, betas=(0.0, 0.0))
    reports = refreshes(optimizer, params, 6, disjoint)
    assert [report.ratio for report in reports] == [0.2, 0.2, 0.1, 0.06, 0.06, 0.06]


def test_both_at_once(backend):
    params = small_model()
    optimizer = make(
        params, backend=backend, mask_interval=AdaptiveInterval(1, maximum=4),
        isolation_ratio=AdaptiveRatio(0.1, factor=1.5, maximum=0.2),
    )  # fmt: skip
    reports = refreshes(optimizer, params, 12, the_same)
    assert [(r.step, r.interval, round(r.ratio, 3)) for r in reports] == [
        (1, 1, 0.1), (2, 2, 0.1), (4, 4, 0.15), (8, 4, 0.2), (12, 4, 0.2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("now", "jaccard", "following"),
    [
        (10, 1.0, 15), (10, 0.8, 15), (10, 0.79, 10), (10, 0.4, 10), (10, 0.39, 6), (10, 0.0, 6),
        (19, 0.9, 20), (6, 0.1, 5), (5, 0.1, 5), (20, 1.0, 20), (7, 1.0, 11), (7, 0.0, 5),
    ],
)  # fmt: skip
def test_the_next_interval(now, jaccard, following):
    adaptive = AdaptiveInterval(10, minimum=5, maximum=20, low=0.4, high=0.8, factor=1.5)
    assert adaptive.following(now, jaccard) == following


@pytest.mark.parametrize(
    ("now", "jaccard", "following"),
    [
        (0.25, 1.0, 0.5),
        (0.25, 0.9, 0.5),
        (0.25, 0.7, 0.25),
        (0.25, 0.49, 0.125),
        (0.1, 0, 0.1),
        (0.4, 1, 0.5),
    ],
)
def test_the_next_ratio(now, jaccard, following):
    assert AdaptiveRatio(0.25, minimum=0.1, maximum=0.5).following(now, jaccard) == following


def test_agreement_of_masks_of_two_sizes():
    assert agreement(isolated=10, entered=2, released=2) == pytest.approx(8 / 12)  # the Jaccard overlap
    assert agreement(isolated=20, entered=10, released=0) == 1.0
    assert agreement(isolated=10, entered=0, released=10) == 1.0
    assert agreement(isolated=20, entered=20, released=10) == 0.0
    assert agreement(isolated=10, entered=10, released=0) is None
    assert agreement(isolated=0, entered=0, released=10) is None
    assert agreement(isolated=0, entered=0, released=0) is None


def test_bounds_left_out():
    assert (AdaptiveInterval().minimum, AdaptiveInterval().maximum) == (10, 1000)
    assert (AdaptiveInterval(4).minimum, AdaptiveInterval(4).maximum) == (1, 40)
    assert (AdaptiveRatio(0.2).minimum, AdaptiveRatio(0.2).maximum) == (0.02, 0.5)
    assert AdaptiveRatio(0.75).maximum == 0.75


@pytest.mark.parametrize(
    ("adaptive", "arguments", "said"),
    [
        (AdaptiveInterval, {"initial": 0}, "AdaptiveInterval.initial must be an int >= 1, got 0"),
        (AdaptiveInterval, {"initial": 2.5}, "initial must be an int"),
        (AdaptiveInterval, {"minimum": 0}, "minimum must be an int >= 1"),
        (AdaptiveInterval, {"minimum": 101}, r"initial must be within minimum and maximum \(101 to 1000\), got 100"),
        (AdaptiveInterval, {"minimum": 200, "maximum": 100}, "initial must be within"),
        (AdaptiveInterval, {"maximum": 99}, "initial must be within"),
        (AdaptiveInterval, {"low": 0.95}, r"low must be at most high \(0.9\), got 0.95"),
        (AdaptiveInterval, {"high": 1.5}, r"high must be a number in \[0, 1\], got 1.5"),
        (AdaptiveInterval, {"low": math.nan}, "low must be"),
        (AdaptiveInterval, {"factor": 1.0}, "factor must be a number above 1, got 1.0"),
        (AdaptiveInterval, {"factor": math.inf}, "factor must be"),
        (AdaptiveRatio, {"initial": 1.0}, r"AdaptiveRatio.initial must be a number in \[0, 1\), got 1.0"),
        (AdaptiveRatio, {"initial": 0}, r"initial must be a number in \(0, 1\), got 0"),
        (AdaptiveRatio, {"minimum": 0}, r"minimum must be a number in \(0, 1\), got 0"),
        (AdaptiveRatio, {"maximum": 1.0}, "maximum must be"),
        (AdaptiveRatio, {"maximum": 0.005}, "initial must be within"),
    ],
)  # fmt: skip
def test_what_an_adaptive_schedule_refuses(adaptive, arguments, said):
    with pytest.raises(ValueError, match=said):
        adaptive(**arguments)


# --- stopped and resumed ------------------------------------------------------------------------------------

SCHEDULES = {
    "functions": {"mask_interval": slower, "isolation_ratio": wave},
    "interval": {"mask_interval": AdaptiveInterval(2, maximum=8, low=0.45, high=0.55), "betas": (0.5, 0.7)},
    "ratio": {"isolation_ratio": AdaptiveRatio(0.1, low=0.45, high=0.55, factor=1.3), "betas": (0.5, 0.7)},
    "both": {
        "mask_interval": AdaptiveInterval(2, low=0.5, high=0.6, factor=1.6),
        "isolation_ratio": AdaptiveRatio(0.2, low=0.5, high=0.6),
        "mask_warmup": 1,
        "state_dtype": torch.bfloat16,
    },
}


def through_a_file(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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


# --- refused, with nothing changed --------------------------------------------------------------------------


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("isolation_ratio", 1.0, r"a number in \[0, 1\)"),
        ("isolation_ratio", -0.1, r"a number in \[0, 1\)"),
        ("isolation_ratio", math.nan, r"a number in \[0, 1\)"),
        ("isolation_ratio", None, r"a number in \[0, 1\)"),
        ("mask_interval", 0, "an int >= 1"),
        ("mask_interval", 2.0, "an int >= 1"),
        ("mask_interval", None, "an int >= 1"),
    ],
)
def test_a_bad_value_of_a_function_is_refused_before_anything_changes(backend, name, value, allowed, first):
    bad = True
    good = {"isolation_ratio": 0.2, "mask_interval": 1}[name]
    settings = {
        "mask_interval": 1,
        "mask_warmup": first,
        name: lambda T: value if T == first and bad else good,
    }
    params, twin_params = small_model(), small_model()
    optimizer = make(params, backend=backend, **settings)
    twin = make(twin_params, backend=backend, **{**settings, name: good})
    train(optimizer, params, first - 1)
    give_gradients(params, first - 1)
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{name}\({first}\) must be {allowed}, got {value}"):
            optimizer.step()
        assert snapshot(optimizer) == before
    bad = False
    train(optimizer, params, range(first - 1, 6))
    train(twin, twin_params, 6)
    assert_same_run(optimizer, twin)


def test_a_bad_ratio_is_refused_by_a_refresh_at_will():
    params = small_model()
    optimizer = make(params, mask_interval=None, isolation_ratio=lambda T: 0.1 if T < 2 else 2)
    train(optimizer, params, 1)
    assert optimizer.refresh_isolation_mask().isolated == math.floor(0.1 * N)
    train(optimizer, params, range(1, 2))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"isolation_ratio\(2\) must be"):
        optimizer.refresh_isolation_mask()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"isolation_ratio": lambda T: 1.5}, r"isolation_ratio\(0\) must be a number in \[0, 1\), got 1.5"),
        ({"mask_interval": lambda T: T}, r"mask_interval\(0\) must be an int >= 1, got 0"),
        ({"isolation_ratio": AdaptiveInterval()}, "isolation_ratio must be"),
        ({"mask_interval": AdaptiveRatio()}, "mask_interval must be"),
        ({"isolation_ratio": AdaptiveRatio(), "mask_interval": None}, "mask_interval must be given with an AdaptiveRatio"),
    ],
)  # fmt: skip
def test_what_the_constructor_refuses(settings, said):
    with pytest.raises(ValueError, match=said):
        MaskedEMAAdamW(None, **settings)


# --- beside everything else ---------------------------------------------------------------------------------


def test_a_refresh_at_will_leaves_the_plan_as_it_is():
    params = small_model()
    settings = {"mask_interval": AdaptiveInterval(2), "isolation_ratio": AdaptiveRatio(0.1)}
    optimizer = make(params, **settings)
    for number in range(3):
        the_same(params, number)
        optimizer.step()
    (before,) = held(optimizer)
    for _ in range(3):
        report = optimizer.refresh_isolation_mask()
        assert (report.ratio, report.interval) == (0.1, 2)
    assert held(optimizer) == [before | {schedules.LAST_KEY: 3}]
    assert optimizer.isolation_report() is report


def test_a_mask_that_no_refresh_selected_is_no_earlier_mask():
    params = small_model()
    optimizer = make(params, mask_interval=AdaptiveInterval(2))
    for p in params.values():
        optimizer.set_isolation_mask(p, torch.ones(p.shape, dtype=torch.bool))
    (first,) = refreshes(optimizer, params, 3)
    assert first.jaccard < 0.5 and first.interval == 2


def test_a_new_stage_starts_the_schedules_anew():
    params = small_model()
    optimizer = make(params, **SCHEDULES["both"])
    fresh = held(optimizer)
    train(optimizer, params, 9)
    assert held(optimizer) != fresh
    optimizer.carry_importance(optimizer.state_dict())
    assert held(optimizer) == fresh


def test_a_group_that_joins_later_follows_the_same_schedule():
    params = small_model()
    optimizer = make(params, **SCHEDULES["both"])
    train(optimizer, params, 4)
    late = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [("late", late)], schedules.NEXT_KEY: 99})
    assert held(optimizer)[0] == held(optimizer)[1]
    train(optimizer, params | {"late": late}, range(4, 12))
    assert held(optimizer)[0] == held(optimizer)[1]


def test_skipped_steps_are_no_steps_of_a_schedule():
    params = small_model()
    optimizer = make(params, mask_interval=slower, isolation_ratio=wave)
    seen = []
    for number in range(1, 15):
        give_gradients(params, number)
        optimizer.found_inf = torch.tensor(float(number in (1, 4, 5, 9)))
        last = optimizer.isolation_report()
        optimizer.step()
        if optimizer.isolation_report() is not last:
            seen.append((number, optimizer.isolation_report().step))
    assert [step for _, step in seen] == [1, 2, 3, 5, 7, 10]
    assert [number for number, _ in seen] == [2, 3, 6, 8, 11, 14]


def test_nothing_is_refreshed_where_the_ratio_is_always_0():
    params = small_model()
    optimizer = make(params, mask_interval=slower, isolation_ratio=0.0)
    assert refreshes(optimizer, params, 5) == []
    assert all("isolation_mask" not in state for state in optimizer.state.values())
