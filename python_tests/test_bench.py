"""The benchmarks' arithmetic, rows and cases, and a whole run at tiny sizes. Nothing here judges a time."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import bench_memory, registry, results, run
from bench.registry import Case, Plan, Target
from python_tests.bench_rows import library_case, linear_rows, shared

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("values", [[3.0], [2.0, 1.0], [5.0, 1.0, 4.0, 2.0, 3.0], list(range(11))])
@pytest.mark.parametrize("q", [0, 20, 50, 80, 100])
def test_percentile_is_numpys(values, q):
    assert results.percentile(values, q) == pytest.approx(np.percentile(values, q))


def test_percentiles_of_five_values():
    assert results.percentiles([50, 10, 40, 20, 30]) == {"p20": 18, "p50": 30, "p80": 42}


def test_ratios_are_taken_round_by_round():
    """A machine that slows twofold for a while slows both sides: the paired ratio does not move."""
    ours, beside = [1.0, 2.0, 2.0, 1.0], [2.0, 4.0, 4.0, 2.0]
    assert results.paired_ratios(ours, beside) == [0.5] * 4
    with pytest.raises(ValueError, match="3 timings of ours, 2"):
        results.paired_ratios([1.0, 1.0, 1.0], [1.0, 1.0])


def test_line_through_known_costs():
    sizes = [1e5, 1e6, 1e7, 1e8]
    assert results.line(sizes, [2 + 3e-6 * n for n in sizes]) == pytest.approx((2, 3e-6, 0), abs=1e-9)
    bent = results.line(sizes, [n**1.5 for n in sizes])
    assert bent.deviation > 0.5


def test_targets_have_limits_on_either_side():
    assert Target("ratio.p50", 1.02).met({"ratio": {"p50": 1.02}}) is True
    assert Target("ratio.p50", 1.02).met({"ratio": {"p50": 1.021}}) is False
    assert Target("share", 1.1, 0.9).met({"share": 0.8}) is False
    assert Target("share", 1.1, 0.9).met({"ratio": None}) is None


# ---------------------------------------------------------------- rows


def test_timing_row_from_hand_made_timings():
    row = run.timing_row(library_case(), shared())
    assert row["ours_ms"] == pytest.approx({"p20": 2.8, "p50": 4.0, "p80": 5.2})
    assert row["beside_ms"]["p50"] == pytest.approx(2.0)
    assert row["ratio"]["p50"] == pytest.approx(2.0)  # of 2, 2 and 3
    assert row["ns_per_element"] == pytest.approx(4.0)
    assert row["gbps"] == pytest.approx(28.125 / 4)
    assert row["beside_gbps"] == pytest.approx(14.0)
    copy = run.timing_row(library_case(name="copy", target=None), shared()) | {"gbps": 14.0625}
    run.judge([row, copy], judged=True)
    assert row["met"] is False and row["copy_share"] == pytest.approx(0.5)
    assert copy["met"] is None
    results.check_row(row)


def test_what_a_refresh_adds_is_a_difference():
    row = run.timing_row(library_case(minus_beside=True), shared())
    assert row["ours_ms"]["p50"] == pytest.approx(2.0)  # of 1, 2 and 4
    assert row["ratio"]["p50"] == pytest.approx(1.0)  # of 1, 1 and 2


def test_a_row_without_its_keys_is_refused():
    row = run.timing_row(library_case(), shared())
    with pytest.raises(ValueError, match=r"'step-f32' lacks met, copy_share"):
        results.check_row(row)


def test_fit_takes_every_size():
    # ns an element: a fixed cost of 0.5 ms and 2 ns each, but for the largest
    rows = linear_rows({10**5: 7.0, 10**6: 2.5, 10**7: 2.05, 10**8: 3.0}, "linear-step-f32-")
    fits = {row["name"]: row for row in run.fit_rows(rows, dict.fromkeys(results.ROW_KEYS))}
    assert 0.1 < fits["linear-step-f32-line"]["line"]["deviation"] < 0.3
    assert fits["linear-step-f32-cost-ratio"]["cost_ratio"] == pytest.approx(3.0 / 2.05)


# ---------------------------------------------------------------- cases


def test_bytes_a_step_moves():
    f32, bf16 = torch.float32, torch.bfloat16
    assert Case("x", "step", f32, 80, 1).step_bytes == 28.125
    assert Case("x", "step", bf16, 80, 1).step_bytes == 14.125
    assert Case("x", "step", f32, 80, 1, {"isolation_ratio": 0.0}).step_bytes == 28
    assert Case("x", "step", f32, 80, 1, {"importance_beta": 0.99}).step_bytes == 36.125
    assert Case("x", "refresh", bf16, 80, 1).refresh_bytes(stand_alone=True) == 6.25


def test_tensors_hold_every_element():
    assert Case("x", "step", torch.float32, 1003, 10).tensor_sizes() == [101] * 3 + [100] * 7


def test_names_are_unique_and_every_variant_is_there():
    plan = Plan()
    cases = [
        *registry.step_cases(plan),
        *registry.refresh_cases(plan),
        *registry.linear_cases(plan),
        *registry.linear_refresh_cases(plan),
        *registry.tensors_cases(plan),
    ]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert len(registry.refresh_cases(plan)) == 2 * (2 * 2 * 3 - 2)  # zscore refuses hysteresis
    assert {"linear-step-f32-1e5", "linear-step-f32-1e8"} <= set(names)


# ---------------------------------------------------------------- memory


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
def test_a_temporary_that_is_given_back_is_seen():
    """The memory rows are worth as much as what they would notice: 8 MiB, freed before the call returns."""
    script = (
        "from bench.bench_memory import peak_mib\n"
        "print(peak_mib(lambda: None), peak_mib(lambda: len(b'x' * (8 << 20))), peak_mib(lambda: None))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | bench_memory.MALLOC,
        capture_output=True,
        text=True,
        check=True,
    )
    before, during, after = map(float, done.stdout.split())
    assert before < 0.5 and 7.5 < during < 9 and after < 0.5


# ---------------------------------------------------------------- a run


def test_quick_run_produces_every_row(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    # one thread: on cores that other tests use, two would wait for each other
    arguments = ["--quick", "--threads", "1", "--elements", "2000", "--sizes", "1e3", "1e4"]
    arguments += ["--memory-elements", "2000", "--seconds", "0.01", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.run", *arguments],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "none was judged" in done.stdout
    (path,) = tmp_path.glob("cpu-*.json")
    rows = {row["name"]: row for row in results.load(path)}
    plan = replace(Plan().quick(), elements=2000, sizes=(1000, 10000))
    steps = [*registry.step_cases(plan), *registry.linear_cases(plan), *registry.tensors_cases(plan)]
    refreshes = [*registry.refresh_cases(plan), *registry.linear_refresh_cases(plan)]
    expected = {"copy", *(case.name for case in steps), *(name for name, _, _ in run.MEMORY_CASES)}
    expected |= {f"{case.name}-{kind}" for case in refreshes for kind in ("after-step", "stand-alone")}
    expected |= {f"linear-{what}-f32-{fit}" for what in ("step", "refresh") for fit in ("line", "cost-ratio")}
    expected |= {case.name for case in registry.host_cases(plan) if case.beside == registry.COPY}
    assert set(rows) == expected
    assert not any(row["complete"] for row in rows.values())
    assert all(row["met"] is None for row in rows.values())
    assert rows["step-f32"]["isolated"] > 0, "the timed steps had a mask"
    assert results.newest_complete(tmp_path) is None
