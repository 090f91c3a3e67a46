"""Schedules of the mask interval and the isolation ratio: functions of T, and those that follow the masks' drift."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from epi_kernels import AdaptiveInterval, AdaptiveRatio, MaskedEMAAdamW
from epi_kernels.optim import schedules
from python_tests.harness import assert_same_run, give_gradients, make, small_model, snapshot, train
from python_tests.schedule_runs import SCHEDULES, N, disjoint, held, refreshes, slower, the_same, wave


@pytest.fixture(params=["reference", "cpu"])
def backend(request) -> str:
    return request.param


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
