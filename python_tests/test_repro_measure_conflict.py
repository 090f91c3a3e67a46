"""Conflict between the gradients of tasks, against a plain one in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from epi_kernels.repro.measure import conflict as conflicts
from epi_kernels.repro.measure.passes import gradients
from epi_kernels.repro.methods.base import token_loss
from epi_kernels.repro.methods.published import PublishedEPI
from python_tests.measure_runs import ROWS, Data, make_stage, observe, train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_conflict_of_known_cosines():
    cosine = [[1.0, -0.5, 0.25], [-0.5, 1.0, -0.1], [0.25, -0.1, 1.0]]
    assert conflicts.conflict(cosine) == {"score": pytest.approx(20), "share": pytest.approx(200 / 3)}
    assert conflicts.conflict(cosine, 2) == {"score": pytest.approx(5), "share": 50}
    assert conflicts.cosines([[4.0, -3.0, 0.0], [-3.0, 9.0, 0.0], [0.0, 0.0, 0.0]]) == [
        [1.0, -0.5, 0.0],
        [-0.5, 1.0, 0.0],
        [0.0, 0.0, 0.0],
    ]


def test_conflict():
    stage = make_stage(5, dropout=0.0)
    data, (observer,) = observe(stage, "conflict:every=3,rows=6")
    expected = {}

    class Plain:
        def before_step(self, stage, step):
            if step not in (0, 3, 4):
                return
            params = list(stage.model.parameters())
            held = [param.grad for param in params]
            flat = []
            for task in (0, 1):
                stage.model.zero_grad()
                token_loss(stage.model, Data().batch(task, 0, 6)).backward()
                flat.append(
                    np.concatenate([param.grad.numpy().reshape(-1) for param in params]).astype(np.float64)
                )
            for param, grad in zip(params, held):
                param.grad = grad
            free = ~np.concatenate(
                [stage.optimizer.isolation_mask(param).numpy().reshape(-1) for param in params]
            )
            for of, keep in (("all", slice(None)), ("free", free)):
                a, b = flat[0][keep], flat[1][keep]
                expected[step, of] = a @ b / np.sqrt((a @ a) * (b @ b))

        def after_step(self, stage, step):
            pass

    train(stage, data, [Plain(), observer])
    record = observer.record()
    assert [point["step"] for point in record["points"]] == [0, 3, 4]
    for point in record["points"]:
        for of in ("all", "free"):
            cosine = expected[point["step"], of]
            assert point[of]["cosines"][0][1] == pytest.approx(cosine, rel=1e-9)
            assert point[of]["score"] == pytest.approx(100 * max(0, -cosine))
            assert point[of]["share"] == (100 if cosine < 0 else 0)
    assert expected[4, "all"] != expected[4, "free"]
    mean = np.mean([100 * max(0, -expected[step, "free"]) for step in (0, 3, 4)])
    assert record["mean"]["free"]["score"] == pytest.approx(mean)
    assert record["mean"]["free"]["by_task"][1]["score"] == pytest.approx(mean)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_gradient_is_of_the_mean_loss_a_token_whatever_the_micro_batches(parts):
    """As a step's: rows with long answers weigh more, and a micro-batch without any is passed over."""
    batch = Data().batch(None, 0, ROWS)
    for row, known in enumerate((2, 9, 10, 10)):
        batch.labels[row, :known] = -100
    whole, split = (make_stage(1, dropout=0.0, accumulation=count) for count in (1, parts))
    found = gradients(split, batch)
    for one, other in zip(gradients(whole, batch), found, strict=True):
        torch.testing.assert_close(one, other)
    batch.labels.fill_(-100)
    assert not any(one.any() for one in gradients(split, batch))


def test_what_epi_as_published_isolates_is_not_free():
    stage = make_stage(3, lambda model: PublishedEPI(model.parameters(), ratio=0.2), dropout=0.0)
    data, (observer,) = observe(stage, "conflict:every=1")
    for group in stage.optimizer.param_groups:
        for param in group["params"]:
            assert not stage.optimizer.isolation_mask(param).any()

    class Refreshes:
        def before_step(self, stage, step):
            pass

        def after_step(self, stage, step):
            stage.optimizer.refresh()

    train(stage, data, [observer, Refreshes()])
    first, *others = observer.record()["points"]
    assert first["all"] == first["free"] and all(one["all"] != one["free"] for one in others)


def test_one_task_has_no_conflict():
    stage = make_stage(1)
    stage.tasks = ("one",)
    data, (observer,) = observe(stage, "conflict")
    train(stage, data, [observer])
    assert observer.record() == {"tasks": ["one"]} and data.asked == []
