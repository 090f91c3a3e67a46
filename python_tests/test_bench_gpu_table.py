"""The README's blocks on a GPU: commands where nothing was run, tables and verdicts where something was."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench import gpu_table, report, results, side_by_side_table, sources
from bench.contenders import CONTENDERS, REFERENCE
from bench.gpu_large import ENTERED
from python_tests.bench_rows import shared

H200 = {"type": "cuda", "name": "NVIDIA H200", "capability": "9.0"}


def percentiles(value: float) -> dict[str, float]:
    return {"p20": 0.9 * value, "p50": value, "p80": 1.1 * value}


def identity(**changes) -> dict:
    return {**shared(), "device": H200, "smoke": False, "kernel_hash": sources.kernel_hash(), **changes}


def write(folder: Path, name: str, record) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record))


# --- made-up records ----------------------------------------------------------------------------------------------


def device_run(over_torch: float = 1.01, copy_share: float = 0.93, **changes) -> dict:
    """Of `make gpu`: workloads of each kind; the llama's ratio is the larger by 0.01, 8-bit states take 0.75 of the others'."""
    rows = [
        {
            "name": f"time-{workload}-{dtype}-{states}-triton",
            "workload": workload,
            "dtype": dtype,
            "backend": "triton",
            "stochastic_rounding": None if dtype == "float32" else True,
            "state_dtype": states,
            "ms": {"step": percentiles(2.0), "torch": percentiles(1.98)},
            "step_over_torch": percentiles(
                (0.75 if states else 1.0) * over_torch + 0.01 * (workload == "llama-1b")
            ),
            "refresh_over_step": percentiles(0.5),
            "standalone_refresh_over_step": percentiles(0.75),
            "refresh_peak_above_step_bytes": 1 << 19,
            "step_gbps": 3900.0,
            "copy_share": copy_share,
        }
        for workload in ("one-tensor", "llama-1b")
        for dtype, states in (("float32", None), ("bfloat16", None), ("bfloat16", "int8"))
    ]
    rows.append({"name": "time-one-tensor-f32-cuda", "skipped": "not timed: tests of cuda fail"})
    tests = {"run": 500, "failed": 0}
    return identity(rows=rows, tests=tests, copy_gbps=percentiles(4200.0), complete=True, **changes)


MS = {"torch fused, float32": 10.0, "torch fused, bfloat16": 5.0, gpu_table.EIGHT_BIT: 3.9}


def side_by_side_rows(device: dict = H200, date: str = "2030-01-02T03:04:05Z") -> list[dict]:
    """Every contender takes 20 ms unless MS says otherwise; flashoptim is not installed."""
    rows = []
    for where in ("one-tensor", "small-tensors"):
        for one in CONTENDERS:
            beside = REFERENCE[one.weights]
            row = dict.fromkeys(results.ROW_KEYS) | shared() | {"date": date, "device": device}
            row |= {"name": f"{where}-{one.slug}", "list": where, "contender": one.name, "note": one.note}
            row |= {"isolates": one.isolates, "beside": beside, "elements": 100, "tensors": 1, "threads": 2}
            if one.name.startswith("flashoptim"):
                rows.append(row | {"skipped": "ImportError: No module named 'flashoptim'"})
                continue
            ms = MS.get(one.name, 20.0)
            row |= dict.fromkeys(results.TIMING_KEYS) | {"beside": beside}
            row |= {"ours_ms": percentiles(ms), "ratio": percentiles(ms / MS[beside])}
            row |= {"gbps": 1000.0, "copy_share": 0.86, "state_bytes_per_element": 4.0, "step_peak_bytes": 0}
            rows.append(row)
    return rows


def large_run(**changes) -> dict:
    rows = []
    for one in ENTERED:
        row = {"contender": one.name, "isolates": one.isolates, "note": one.note, "parameters": 8_030_261_248}
        if one.name.startswith("EPI"):
            row["skipped"] = "out of memory, as expected (201 GB): CUDA out of memory."
        elif one.name.startswith("torchao 4"):
            row["error"] = "begun 2 times and never finished: stopped after 540 s; stopped after 540 s"
        else:
            row |= {"step_ms": percentiles(30.0), "peak_bytes": 50_000_000_000}
            row |= {"state_bytes_per_parameter": 2.2 if "8-bit" in one.name else 4.0}
            if one.refresh:
                row |= {"refresh_ms": percentiles(12.0), "refresh_peak_bytes": 1 << 20}
        rows.append(row)
    return identity(model="Llama-3-8B", tokens=512, rows=rows, **changes)


# --- nothing was run ----------------------------------------------------------------------------------------------


def test_what_was_never_run_says_so_with_its_command(tmp_path):
    assert gpu_table.timings(tmp_path) == (
        "Timings: never run: `make gpu`.\n\nSide by side: never run on a GPU: `make gpu-side-by-side`."
    )
    assert gpu_table.large(tmp_path) == "Large model: never run: `make gpu-large`."


@pytest.mark.parametrize("change", [{"smoke": True}, {"device": {"type": "cpu", "name": "cpu"}}])
def test_a_smoke_run_and_a_run_on_a_cpu_are_none(tmp_path, change):
    write(tmp_path, "gpu-1", device_run(**change))
    write(tmp_path, "large-1", large_run(**change))
    write(tmp_path, "side-by-side-1", side_by_side_rows(device={"type": "cpu", "name": "cpu"}))
    assert "never run: `make gpu`" in gpu_table.timings(tmp_path)
    assert "never run on a GPU: `make gpu-side-by-side`" in gpu_table.timings(tmp_path)
    assert gpu_table.large(tmp_path) == "Large model: never run: `make gpu-large`."


def test_the_readme_has_the_blocks(tmp_path):
    names = ("gpu", "gpu-large")
    text = "".join(f"<!-- bench:begin {name} -->\n<!-- bench:end {name} -->\n" for name in names)
    written = report.rewrite(text, tmp_path)
    assert "never run: `make gpu`." in written and "never run: `make gpu-large`." in written
    write(tmp_path, "large-1", large_run())
    write(tmp_path, "gpu-1", device_run())
    assert "Llama-3-8B, 8,030,261,248 parameters" in report.rewrite(written, tmp_path)
    assert "| llama-1b, float32 | triton |" in report.rewrite(written, tmp_path)
    for name in names:
        assert f"<!-- bench:begin {name} -->" in report.README.read_text()


# --- timings and targets ------------------------------------------------------------------------------------------


def verdicts(text: str) -> dict[str, tuple[str, str]]:
    """(measured, verdict) by target."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {line[0]: (line[2], line[3]) for line in lines if len(line) == 4 and "at " in line[1]}


def test_timings_are_a_table_with_verdicts(tmp_path):
    write(tmp_path, "gpu-1", device_run(over_torch=1.01))
    text = gpu_table.timings(tmp_path)
    assert text.startswith(
        "NVIDIA H200, torch 2.13.0, 2030-01-02, commit 0123456789; a copy moves 4,200 GB/s"
    )
    line = "| llama-1b, float32 | triton | 2.0 | 2.0 | 1.02 (0.92-1.12) | 3,900 (93%) | 0.50 (0.45-0.55) |"
    assert line in text and "| one-tensor, bfloat16, stochastic rounding | triton |" in text
    assert "time-one-tensor-f32-cuda: not timed: tests of cuda fail." in text
    found = verdicts(text)
    assert found["float32, isolation on, `triton`: step, of torch fused"] == ("1.020", "met")
    assert found["float32, isolation on, `triton`: share of copy bandwidth"] == ("0.930", "met")
    assert found["bfloat16, 8-bit states, isolation on, `triton`: step, of torch fused"] == ("0.768", "met")
    assert found["bfloat16, 8-bit states, isolation on, `triton`: share of copy bandwidth"] == (
        "0.930",
        "met",
    )
    assert found["a refresh every 100 steps, `triton`: of the steps between"] == ("0.005", "met")
    assert "| one-tensor, bfloat16, 8-bit states, stochastic rounding | triton |" in text
    assert "5 of 5 met, 14 not measured." in text


def test_the_worst_workload_decides(tmp_path):
    write(tmp_path, "gpu-1", device_run(over_torch=1.015, copy_share=0.89))
    found = verdicts(gpu_table.timings(tmp_path))
    assert found["float32, isolation on, `triton`: step, of torch fused"] == ("1.025", "**missed**")
    assert found["float32, isolation on, `triton`: share of copy bandwidth"] == ("0.890", "**missed**")
    assert found["bfloat16, 8-bit states, isolation on, `triton`: share of copy bandwidth"] == (
        "0.890",
        "met",
    )


def test_targets_beside_the_peers(tmp_path):
    write(tmp_path, "side-by-side-1", side_by_side_rows())
    text = gpu_table.timings(tmp_path)
    assert "Timings: never run: `make gpu`." in text and "NVIDIA H200, torch 2.13.0" in text
    found = verdicts(text)
    step = "bfloat16 weights, 8-bit states, isolation on: "
    assert found[f"{step}share of copy bandwidth"] == ("0.860", "met")
    assert found[f"{step}of torch fused, bfloat16"] == ("0.780", "met")
    assert found[f"{step}of torch fused, float32"] == ("0.390", "met")
    assert found[f"{step}of bitsandbytes 8-bit"] == ("0.195", "met")
    for peer in gpu_table.FLASHOPTIM:
        assert found[f"{step}of {peer}"] == ("not measured", "-")
    many = "1,000 tensors of 4,096: "
    assert found[f"{many}ours, float32, of torch fused"] == ("2.000", "**missed**")
    assert found[f"{many}{gpu_table.EIGHT_BIT}, of optimi with Kahan"] == ("0.195", "met")


def test_every_contender_a_target_names_is_there():
    names = {one.name for one in CONTENDERS}
    assert {gpu_table.EIGHT_BIT, *gpu_table.PEERS, *gpu_table.HOST_BOUND_PEERS} < names


def test_a_figure_that_is_none_meets_and_misses_nothing():
    claim = gpu_table.Claim("x", gpu_table._at_least(0.9), None)
    assert claim.met is None and claim.cells()[2:] == ["not measured", "-"]
    assert gpu_table.Claim("x", gpu_table._at_least(0.9), math.nan).met is False


def test_kernels_that_changed_since_are_said(tmp_path):
    write(tmp_path, "gpu-1", device_run() | {"kernel_hash": "another"})
    write(tmp_path, "large-1", large_run() | {"kernel_hash": "another"})
    assert "**the kernels have changed since**" in gpu_table.timings(tmp_path)
    assert "**the kernels have changed since**" in gpu_table.large(tmp_path)


def test_a_run_on_a_gpu_leaves_the_table_and_plot_of_the_cpu(tmp_path):
    processor = {"type": "cpu", "name": "cpu"}
    write(tmp_path, "side-by-side-1", side_by_side_rows(processor))
    before = side_by_side_table.text(tmp_path)
    assert before.startswith("Some CPU (avx512), 2 threads")
    write(tmp_path, "side-by-side-2", side_by_side_rows(H200, "2031-01-02T03:04:05Z"))
    assert side_by_side_table.text(tmp_path) == before
    assert "2031-01-02" in gpu_table.timings(tmp_path)


# --- the large model ----------------------------------------------------------------------------------------------


def test_the_large_model_is_a_table(tmp_path):
    write(tmp_path, "large-1", large_run())
    text = gpu_table.large(tmp_path)
    assert "NVIDIA H200, torch 2.13.0, 2030-01-02, commit 0123456789" in text
    ours = next(line for line in text.splitlines() if line.startswith("| **ours, bfloat16, 8-bit states** |"))
    assert "| yes | 50.0 | 30.0 | 12.0 | 1 | 2.200 | weights, gradients | isolates; " in ours
    epi = next(line for line in text.splitlines() if line.startswith("| EPI as published, bfloat16 |"))
    assert "| yes | out of memory | - | - | - | - |" in epi
    assert "EPI as published, bfloat16: out of memory, as expected (201 GB)" in text
    assert "torchao 4-bit: begun 2 times and never finished" in text


def test_a_refresh_without_room_is_said(tmp_path):
    run = large_run()
    (epi,) = [row for row in run["rows"] if row["contender"].startswith("EPI")]
    reason = epi.pop("skipped")
    epi |= {"step_ms": percentiles(300.0), "peak_bytes": 137_000_000_000, "state_bytes_per_parameter": 13.0}
    epi["refresh_skipped"] = reason
    write(tmp_path, "large-1", run)
    text = gpu_table.large(tmp_path)
    assert "| EPI as published, bfloat16 | yes | 137.0 | 300 | out of memory | - | 13.000 |" in text
    assert "EPI as published, bfloat16, refresh: out of memory, as expected" in text


def test_the_newest_run_of_each_model(tmp_path):
    write(tmp_path, "large-1", large_run(date="2031-01-01T00:00:00Z"))
    write(tmp_path, "large-2", large_run())
    write(tmp_path, "large-3", large_run() | {"model": "Mistral-7B"})
    text = gpu_table.large(tmp_path)
    assert text.count("Llama-3-8B, ") == 1 and "2031-01-01" in text and "Mistral-7B, " in text
