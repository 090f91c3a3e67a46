"""What a stage costs: times, peak memory, bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from epi_kernels.repro.manifest import Bytes, StepTime
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
    size, cpu = 96 << 20, torch.device("cpu")
    with cost.PeakMemory(cpu) as first:
        held = torch.ones(size, dtype=torch.uint8)
        del held
        first.settle()
        held = torch.ones(2 * size, dtype=torch.uint8)
        del held
    with cost.PeakMemory(cpu) as third:
        pass
    if first.of == "process":
        assert first.before is not None and 0.9 * size < first.bytes - first.before < 1.5 * size
        assert third.bytes < first.bytes
    else:
        assert first.of == "process since its start" and first.bytes >= size


def test_a_peak_is_above_what_freed_memory_left():
    """Many small pieces, which glibc keeps when they are freed: a run that takes them anew needs them all the same."""
    pieces, cpu = 4_000, torch.device("cpu")

    def run() -> int:
        with cost.PeakMemory(cpu) as peak:
            held = [torch.ones(16_384, dtype=torch.uint8) for _ in range(pieces)]
            del held
        if peak.of != "process":
            pytest.skip("the high-water mark of this process cannot be reset")
        assert peak.before is not None
        return peak.bytes - peak.before

    run()
    assert run() > 0.8 * pieces * 16_384


def test_a_peak_goes_on_where_its_stage_was_stopped():
    with cost.PeakMemory(torch.device("cpu")) as stopped:
        pass
    stopped._final, stopped.before = 900 << 30, 100 << 30
    with cost.PeakMemory(torch.device("cpu")) as later:
        later.before = 7 << 30
        later.load_state_dict(stopped.state_dict())
    assert later.bytes == (800 + 7) << 30, "what it added, above what this process holds"
    with cost.PeakMemory(torch.device("cpu")) as unknown:
        unknown.before = None
        unknown.load_state_dict(stopped.state_dict())
    assert unknown.bytes == 900 << 30
    with cost.PeakMemory(torch.device("cpu")) as older:
        older.load_state_dict(123 << 40)
    assert older.bytes == 123 << 40


def test_stages_in_sequence():
    def stage(total: int, peak: int | None, before: int | None) -> Bytes:
        return Bytes(parameters=10, weights=40, optimizer={"total": total}, peak=peak, before=before)

    assert cost.most([]) is None and cost.mean_time([]) is None
    found = cost.most([stage(80, 900, 500), stage(83, 700, 600), stage(81, None, None)])
    assert found == stage(83, 900, 500)
    assert cost.most([stage(80, None, None)]) == stage(80, None, None)
    fast, slow = (
        StepTime(optimizer_p20=x, optimizer_p50=2 * x, optimizer_p80=3 * x, training_p50=4 * x, steps=n)
        for x, n in ((1.0, 30), (5.0, 10))
    )
    assert cost.mean_time([fast]) == fast
    assert cost.mean_time([fast, slow]) == StepTime(
        optimizer_p20=2.0, optimizer_p50=4.0, optimizer_p80=6.0, training_p50=8.0, steps=40
    )


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
