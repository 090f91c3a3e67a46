"""What observers say of the steps around refreshes, and the curve, against plain numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from epi_kernels.repro.methods.base import token_loss
from python_tests.measure_runs import ROWS, Data, carried, make_stage, masked, observe, train

pytestmark = pytest.mark.usefixtures("one_thread")


def watched(steps: int, *names: str, start=None, **options):
    """Runs; returns the records, and by step done the weights, and by step the loss and the gradient's norm."""
    stage = make_stage(
        steps, lambda model: masked(model, **options), dropout=0.0, interval=options["mask_interval"]
    )
    if start is not None:
        start(stage)
    data, observers = observe(stage, *names)
    weights = {0: flat(stage)}
    seen, held_out = {}, {}

    def look(step: int) -> None:
        weights[step + 1] = flat(stage)
        seen[step] = (stage.loss, stage.grad_norm)
        with torch.no_grad():
            held_out[step + 1] = float(token_loss(stage.model.eval(), Data().validation(ROWS)))
        stage.model.train()

    train(stage, data, observers, each=look)
    return [one.record() for one in observers], weights, seen, held_out


def flat(stage) -> np.ndarray:
    return np.concatenate([param.detach().numpy().reshape(-1) for param in stage.model.parameters()]).astype(
        np.float64
    )


def test_stability():
    (record,), weights, seen, held_out = watched(27, "stability:window=5", mask_interval=8)
    half = 2  # a quarter of the interval
    assert [(one["step"], one["kind"]) for one in record["events"]] == [
        (8, "refresh"),
        (12, "placebo"),
        (16, "refresh"),
        (20, "placebo"),
        (24, "refresh"),
    ]
    inside = {
        step for one in record["events"] for step in range(one["step"] - half + 1, one["step"] + half + 1)
    }
    assert {row["step"] for row in record["rows"]} == inside | {27}  # the placebo at 28 is not reached

    plain = {
        step: {
            "update": float(np.linalg.norm(weights[step] - weights[step - 1])),
            "validation": held_out[step],
            "loss": seen[step][0],
            "grad_norm": seen[step][1],
        }
        for step in inside
    }
    for row in record["rows"][:-1]:
        expected = plain[row["step"]]
        assert row["update"] == pytest.approx(expected["update"], rel=1e-4)
        assert row["validation"] == pytest.approx(expected["validation"], rel=1e-6)
        assert (row["loss"], row["grad_norm"]) == (expected["loss"], expected["grad_norm"])
    ratios = {"refresh": [], "placebo": []}
    for one in record["events"]:
        at = one["step"]
        assert one["half"] == half
        for name in ("loss", "validation", "grad_norm", "update"):
            before = np.mean([plain[at - 1][name], plain[at][name]])
            after = np.mean([plain[at + 1][name], plain[at + 2][name]])
            assert one["before"][name] == pytest.approx(before, rel=1e-4)
            assert one["after"][name] == pytest.approx(after, rel=1e-4)
            assert one["ratio"][name] == pytest.approx(after / before, rel=1e-4)
        ratios[one["kind"]].append(one["ratio"]["update"])
    for kind, values in ratios.items():
        assert record["mean"][kind]["n"] == len(values)
        assert record["mean"][kind]["update"] == pytest.approx(np.mean(values))


def test_windows_the_stage_does_not_hold_are_left_out():
    # the refresh after step 8 has one row less than it needs after it
    (record,), *_ = watched(10, "stability:window=2", mask_interval=8)
    assert record["events"] == [] and record["mean"]["refresh"] == {"n": 0} | dict.fromkeys(
        ("loss", "validation", "grad_norm", "update")
    )
    assert [row["step"] for row in record["rows"]] == [7, 8, 9, 10]


def test_carried_importance_is_seen_before_the_first_step():
    (curve, stability), *_ = watched(12, "curve:every=5", "stability", start=carried, mask_interval=4)
    assert [one["step"] for one in curve["refreshes"]] == [0, 4, 8, 12]
    assert [one["step"] for one in curve["points"]] == [0, 5, 10, 11]
    assert [(one["step"], one["kind"]) for one in stability["events"]] == [
        (2, "placebo"),
        (4, "refresh"),
        (6, "placebo"),
        (8, "refresh"),
        (10, "placebo"),
    ]


def test_the_curve():
    reports = {}
    stage = make_stage(7, lambda model: masked(model, mask_interval=3))
    data, (curve,) = observe(stage, "curve:every=2")
    stage.optimizer.param_groups[0]["lr"] = 0.25
    seen = {}

    def look(step: int) -> None:
        seen[step] = (stage.loss, stage.grad_norm)
        if step in (2, 5):
            reports[step + 1] = stage.optimizer.isolation_report()

    train(stage, data, [curve], each=look)
    record = curve.record()
    assert record["points"] == [
        {"step": step, "loss": seen[step][0], "grad_norm": seen[step][1], "lr": 0.25} for step in (0, 2, 4, 6)
    ]
    assert [one["step"] for one in record["refreshes"]] == [3, 6]
    elements = sum(param.numel() for param in stage.model.parameters())
    for one in record["refreshes"]:
        report = reports[one["step"]]
        assert one["share"] == report.isolated / elements
        for name in ("jaccard", "entered", "released", "interval"):
            assert one[name] == getattr(report, name)
        assert one["layers"] == {layer.name: layer.isolated / layer.elements for layer in report.layers}
