"""What a refresh selects and what it reports."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from python_tests.cases import Spec, case
from python_tests.harness import Pair, Target, make, small_model, train
from python_tests.oracle import Hyper


def importances(**values: list[float]) -> dict[str, torch.nn.Parameter]:
    """Parameters whose next gradients' squares are these values exactly, as far as roots are exact."""
    params = {}
    for name, u in values.items():
        params[name] = torch.nn.Parameter(torch.ones(len(u)))
        params[name].grad = torch.tensor(u, dtype=torch.float64).sqrt().float()
    return params


def observed(params: dict, **arguments):
    """An optimizer that has stepped once with both betas 0: u is the squared gradient. Never refreshed."""
    optimizer = make(params, betas=(0.0, 0.0), **({"mask_interval": None} | arguments))
    optimizer.step()
    return optimizer


def masks(optimizer, params) -> dict[str, list[int]]:
    return {name: optimizer.isolation_mask(p).int().tolist() for name, p in params.items()}


def test_minmax_ranks_layers_against_each_other():
    """A quiet layer's maximum is worth as much as a loud layer's: scores 1 0.75 0.5 0 and 1 0.25 0.125 0."""
    params = importances(loud=[4e6, 3e6, 2e6, 0.0], quiet=[8e-20, 2e-20, 1e-20, 0.0])
    optimizer = observed(params, isolation_ratio=3 / 8)
    report = optimizer.refresh_isolation_mask()
    assert masks(optimizer, params) == {"loud": [1, 1, 0, 0], "quiet": [1, 0, 0, 0]}
    assert report.threshold == pytest.approx(0.75, rel=1e-6) and report.ties == 0


def test_none_compares_raw_importances():
    params = importances(loud=[4.0, 3.0, 2.0, 0.0], quiet=[8e-20, 2e-20, 1e-20, 0.0])
    optimizer = observed(params, isolation_ratio=3 / 8, normalization="none")
    report = optimizer.refresh_isolation_mask()
    assert masks(optimizer, params) == {"loud": [1, 1, 1, 0], "quiet": [0, 0, 0, 0]}
    assert report.threshold == pytest.approx(2.0)


def test_zscore_may_isolate_negative_scores():
    """k beyond the positive scores: only u > 0 and std > 0 are asked for."""
    params = importances(a=[1.0, 4.0, 9.0, 16.0], equal=[25.0, 25.0, 25.0, 25.0], zeros=[0.0, 0.0, 4.0, 0.0])
    optimizer = observed(params, isolation_ratio=0.99, normalization="zscore")
    report = optimizer.refresh_isolation_mask()
    # k = 11 of 12: the smallest z-score (-1.34, u = 1 in a) stays out; zeros and the equal layer are out anyway.
    assert masks(optimizer, params) == {"a": [0, 1, 1, 1], "equal": [0] * 4, "zeros": [0, 0, 1, 0]}
    assert report.threshold < 0


@pytest.mark.parametrize("normalization", ["minmax", "zscore"])
def test_layer_of_equal_importances_is_never_isolated(normalization: str, target: Target):
    """Whatever their value and number: no rounding of a mean may make them differ."""
    params = {"other": torch.nn.Parameter(torch.ones(4, device=target.device))}
    params["other"].grad = torch.tensor([1.0, 2.0, 3.0, 4.0], device=target.device)
    for value in (1.0, 0.1, 1 / 3, 1e-12, 1e12):
        for n in (1, 3, 7, 100, 1023):
            p = params[f"{n} of {value}"] = torch.nn.Parameter(torch.ones(n, device=target.device))
            p.grad = torch.full((n,), value, device=target.device)
    optimizer = observed(params, isolation_ratio=0.99, normalization=normalization, backend=target.backend)
    optimizer.refresh_isolation_mask()
    isolated = [name for name, p in params.items() if optimizer.isolation_mask(p).any()]
    assert isolated == ["other"]


@pytest.mark.parametrize("normalization", ["minmax", "zscore", "none"])
def test_element_that_never_saw_a_gradient_is_never_isolated(normalization: str):
    params = importances(a=[0.0, 0.0, 0.0, 1.0, 2.0], b=[0.0, 0.0], c=[3.0, 0.0])
    params["d"] = torch.nn.Parameter(torch.ones(3))  # no gradient, no state: u = 0
    optimizer = observed(params, isolation_ratio=0.99, normalization=normalization)
    optimizer.refresh_isolation_mask()
    for name, mask in masks(optimizer, params).items():
        u = params[name].grad if params[name].grad is not None else torch.zeros(3)
        assert not any(m for m, x in zip(mask, u.tolist(), strict=True) if x == 0)
    assert masks(optimizer, params)["c"] == [1, 0]


def test_ties_at_the_threshold_are_all_isolated():
    params = importances(a=[9.0, 4.0, 4.0, 4.0, 1.0, 0.0])
    optimizer = observed(params, isolation_ratio=2 / 6)
    report = optimizer.refresh_isolation_mask()
    assert masks(optimizer, params) == {"a": [1, 1, 1, 1, 0, 0]}
    assert (report.ties, report.isolated, report.entered, report.jaccard) == (2, 4, 4, 0.0)


def test_k_zero_isolates_nothing_and_warns_once():
    params = importances(a=[9.0, 4.0, 1.0])
    optimizer = observed(params, isolation_ratio=0.3)
    optimizer.set_isolation_mask(params["a"], torch.tensor([True, False, False]))
    with pytest.warns(UserWarning, match="0.3"):
        report = optimizer.refresh_isolation_mask()
    assert (report.threshold, report.isolated, report.released, report.ties) == (math.inf, 0, 1, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.refresh_isolation_mask().jaccard == 1.0


def test_eligible_are_all_elements_of_isolating_groups():
    """Frozen, without gradient or without state: they are in N; those of an isolate=False group are not."""
    params = importances(a=[4.0, 3.0, 2.0, 1.0], out=[99.0, 98.0, 97.0, 96.0])
    frozen = torch.nn.Parameter(torch.ones(4), requires_grad=False)
    groups = [
        {"params": [("a", params["a"]), ("frozen", frozen)]},
        {"params": [("out", params["out"])], "isolate": False},
    ]
    from epi_kernels import MaskedEMAAdamW

    optimizer = MaskedEMAAdamW(
        groups,
        betas=(0.0, 0.0),
        isolation_ratio=0.25,
        mask_interval=1,
        backend="reference",
        normalization="none",
    )
    optimizer.step()
    assert optimizer.isolation_report().isolated == 2  # floor(0.25 * 8)
    assert masks(optimizer, params) == {"a": [1, 1, 0, 0], "out": [0, 0, 0, 0]}


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("out_has_state", [False, True])
def test_group_that_does_not_isolate_has_no_say(ratio: float, out_has_state: bool):
    """Neither its elements' number nor its importances, with state or without, move another group's threshold."""
    from epi_kernels import MaskedEMAAdamW

    reports = []
    for beside in (False, True):
        params = importances(a=[4.0, 3.0, 2.0, 1.0, 0.5, 0.1], out=[1.0] * 50)
        if not out_has_state:
            params["out"].grad = None
        groups = [{"params": [("a", params["a"])]}]
        if beside:
            groups.append({"params": [("out", params["out"])], "isolate": False})
        for normalization in ("minmax", "zscore", "none"):
            optimizer = MaskedEMAAdamW(
                groups,
                betas=(0.0, 0.0),
                isolation_ratio=ratio,
                mask_interval=1,
                backend="reference",
                normalization=normalization,
            )
            optimizer.step()
            reports.append(optimizer.isolation_report().as_dict())
    assert reports[:3] == reports[3:]


def test_hysteresis_keeps_what_is_isolated_and_the_count():
    params = importances(a=[10.0, 9.0, 8.0, 7.0, 0.0])
    optimizer = observed(params, isolation_ratio=2 / 5, normalization="none", hysteresis=0.25)
    optimizer.refresh_isolation_mask()
    assert masks(optimizer, params) == {"a": [1, 1, 0, 0, 0]}
    params["a"].grad = torch.tensor([6.0, 9.0, 10.0, 8.0, 0.0]).sqrt()
    optimizer.step()
    report = optimizer.refresh_isolation_mask()
    # 6 / 0.75 = 8 and 9 / 0.75 = 12 against 10 and 8: two are kept or enter, in that order.
    assert masks(optimizer, params) == {"a": [0, 1, 1, 0, 0]}
    assert (report.entered, report.released, report.jaccard) == (1, 1, 1 / 3)
    params["a"].grad = torch.tensor([12.0, 10.0, 10.0, 8.0, 0.0]).sqrt()
    optimizer.step()
    assert optimizer.refresh_isolation_mask().entered == 0
    assert masks(optimizer, params) == {"a": [0, 1, 1, 0, 0]}


def test_scope_layer_takes_its_share_of_every_layer():
    params = importances(a=[4.0, 3.0, 2.0, 1.0], b=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], c=[5.0])
    optimizer = observed(params, isolation_ratio=0.25, scope="layer", normalization="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # k = 0 in c
        report = optimizer.refresh_isolation_mask()
    assert masks(optimizer, params) == {"a": [1, 0, 0, 0], "b": [0, 0, 0, 0, 0, 0, 1, 1], "c": [0]}
    assert report.threshold == pytest.approx({"a": 4.0, "b": 7.0, "c": math.inf})
    assert {row.name: (row.elements, row.isolated) for row in report.layers} == {
        "a": (4, 1),
        "b": (8, 2),
        "c": (1, 0),
    }


def test_layer_key_joins_parameters():
    names = {"h.0.w": [1.0, 2.0], "h.0.b": [4.0, 0.0], "h.1.w": [100.0, 200.0], "h.1.b": [400.0, 0.0]}
    params = importances(**names)
    optimizer = observed(params, isolation_ratio=0.5, layer_key=lambda name: name.split(".")[1])
    report = optimizer.refresh_isolation_mask()
    assert masks(optimizer, params) == {"h.0.w": [0, 1], "h.0.b": [1, 0], "h.1.w": [0, 1], "h.1.b": [1, 0]}
    assert [(row.name, row.elements, row.isolated) for row in report.layers] == [("0", 4, 2), ("1", 4, 2)]


def test_unnamed_parameters_are_reported_by_position():
    params = small_model()
    optimizer = make(params, named=False)
    train(optimizer, params, 2)
    names = [row.name for row in optimizer.isolation_report().layers]
    assert names == ["param_0", "param_1", "param_2", "param_3"]


def test_report_before_and_after(target: Target):
    pair = Pair(case(Spec((40,)), Spec((3, 5)), hyper=Hyper(), isolation_ratio=0.2, mask_interval=2), target)
    assert pair.optimizer.isolation_report() is None
    for _ in range(5):
        pair.step(pair.gradients(["normal", "normal"]))
        pair.check()
    report = pair.optimizer.isolation_report()
    assert pair.optimizer.refresh_isolation_mask() is pair.optimizer.isolation_report() is not report
    assert report.step == 4 and isinstance(report.threshold, float) and isinstance(report.isolated, int)
    assert report.jaccard == (report.isolated - report.entered) / (report.isolated + report.released)


def test_jaccard_of_two_empty_masks_is_one():
    params = small_model()
    optimizer = make(params, isolation_ratio=0.001)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = optimizer.refresh_isolation_mask()
    assert report.jaccard == 1.0 and all(row.jaccard == 1.0 for row in report.layers)


@pytest.mark.parametrize("normalization", ["minmax", "zscore", "none"])
def test_non_finite_importance(normalization: str, target: Target):
    """Counted in N and reported; out of the statistics and the search; never isolated."""
    params = {"a": torch.nn.Parameter(torch.ones(10, device=target.device))}
    values = [math.inf, 1.0, 2.0, math.nan, 4.0, 5.0, 6.0, -math.inf, 8.0, 9.0]
    params["a"].grad = torch.tensor(values, device=target.device)
    optimizer = observed(params, isolation_ratio=0.4, normalization=normalization, backend=target.backend)
    with pytest.warns(UserWarning, match="finite") if target.device == "cpu" else warnings.catch_warnings():
        report = optimizer.refresh_isolation_mask()
    assert report.nonfinite == 3 and report.isolated == 4
    assert masks(optimizer, params) == {"a": [0, 0, 0, 0, 0, 1, 1, 0, 1, 1]}
    [row] = report.layers
    assert (row.elements, row.nonfinite) == (10, 3)
    u = np.array([x * x for x in values if math.isfinite(x)])  # a threshold is of these alone
    expected = {
        "minmax": (25 - u.min()) / (u.max() - u.min()),
        "zscore": (25 - u.mean()) / u.std(),
        "none": 25.0,
    }
    assert report.threshold == pytest.approx(expected[normalization], rel=1e-5)


def test_fewer_finite_scores_than_k():
    params = {"a": torch.nn.Parameter(torch.ones(5))}
    params["a"].grad = torch.tensor([math.inf, math.nan, 3.0, 2.0, math.inf])
    optimizer = observed(params, isolation_ratio=0.8, normalization="none")
    with pytest.warns(UserWarning, match="finite"):
        report = optimizer.refresh_isolation_mask()
    assert masks(optimizer, params) == {"a": [0, 0, 1, 1, 0]} and report.threshold == 4.0 and report.ties == 0


def test_zscore_repeats_to_the_bit(target: Target):
    """Sums in a fixed order: no atomics, whatever the threads do."""
    thresholds = set()
    for _ in range(2 if target.interpreted else 3):
        w = torch.nn.Parameter(torch.ones(3001 if target.interpreted else 50_001, device=target.device))
        w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(0)).to(target.device)
        optimizer = observed({"w": w}, normalization="zscore", backend=target.backend, mask_interval=1)
        thresholds.add(optimizer.isolation_report().threshold)
    assert len(thresholds) == 1


def test_bfloat16_importance_is_read_as_stored():
    """1 and 1 + 2^-10 are the same in bfloat16: both or neither."""
    params = {"a": torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
    optimizer = make(
        params, betas=(0.0, 0.0), mask_interval=None, isolation_ratio=0.25, stochastic_rounding=False
    )
    optimizer.set_isolation_mask(params["a"], torch.zeros(4, dtype=torch.bool))
    state = optimizer.state[params["a"]]
    if "exp_avg_sq" not in state:
        params["a"].grad = torch.zeros(4, dtype=torch.bfloat16)
        optimizer.step()
    optimizer.state[params["a"]]["exp_avg_sq"].copy_(torch.tensor([1.0, 1.0 + 2.0**-10, 0.5, 0.0]))
    assert optimizer.refresh_isolation_mask().ties == 1
    assert masks(optimizer, params) == {"a": [1, 1, 0, 0]}


def test_stochastic_rounding_never_stalls():
    """beta2 = 0.999 moves a bfloat16 by less than half its spacing a step: rounding to nearest never moves it."""
    ends = {}
    for rounding in (True, False):
        w = torch.nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
        optimizer = make({"w": w}, lr=0.0, stochastic_rounding=rounding, isolation_ratio=0.0)
        w.grad = torch.ones_like(w)
        optimizer.step()
        optimizer.state[w]["exp_avg_sq"].fill_(1.0)
        w.grad = torch.zeros_like(w)
        for _ in range(300):
            optimizer.step()
        ends[rounding] = optimizer.state[w]["exp_avg_sq"].float().mean().item()
    assert ends[False] == 1.0
    # 0.999**300 is 0.7407; the mean of 4096 walks has a standard deviation of about 1e-3.
    assert abs(ends[True] - 0.999**300) < 0.005
    assert np.isfinite(ends[True])
