"""What a stage costs: times, peak memory, bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from epi_kernels.repro.measure import cost
from python_tests.measure_runs import make_stage, observe, train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_step_times(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    timer = cost.StepTimer(torch.device("cpu"))
    updates, gradients = [1000, 1000, 1000, 5, 1, 4, 2, 3], [900, 900, 900, 10, 20, 30, 40, 50]
    for index, (update, gradient) in enumerate(zip(updates, gradients)):
        if index == cost.SKIPPED:
            assert timer.result() is None
        with timer.gradient():
            now[0] += gradient / 1e3
        now[0] += 7.0  # an observer at work
        with timer.update():
            now[0] += update / 1e3
    found = timer.result()
    assert found.steps == 5
    expected = np.percentile(updates[3:], [20, 50, 80])
    assert [found.optimizer_p20, found.optimizer_p50, found.optimizer_p80] == pytest.approx(list(expected))
    assert found.training_p50 == pytest.approx(np.median(np.add(updates[3:], gradients[3:])))
    again = cost.StepTimer(torch.device("cpu"))
    again.load_state_dict(timer.state_dict())
    assert again.result() == found


def test_peak_memory():
    size = 96 << 20
    with cost.PeakMemory(torch.device("cpu")) as first:
        held = torch.ones(size, dtype=torch.uint8)
        del held
    with cost.PeakMemory(torch.device("cpu"), at_least=123 << 40) as second:
        pass
    assert second.bytes == 123 << 40
    with cost.PeakMemory(torch.device("cpu")) as third:
        pass
    if first.of == "process":
        assert first.before is not None and first.bytes - first.before > 0.9 * size
        assert third.bytes < first.bytes
    else:
        assert first.of == "process since its start" and first.bytes >= size


def test_bytes():
    stage = make_stage(1)
    data, _ = observe(stage)
    train(stage, data, [])
    found = cost.stage_bytes(stage)
    own = stage.optimizer.state_bytes()
    elements = sum(param.numel() for param in stage.model.parameters())
    assert (found.parameters, found.weights) == (elements, 4 * elements)
    assert found.optimizer == own | {"anchor": 12, "other": own["other"] + 1, "total": own["total"] + 13}
    assert found.peak is None
