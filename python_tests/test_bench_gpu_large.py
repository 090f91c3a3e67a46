"""make gpu-large without a GPU: its slices, its rows, what runs out of memory."""

from __future__ import annotations

import json

import pytest
import torch

from bench import gpu_device, gpu_large, status
from bench.gpu_device import CpuDevice
from bench.gpu_large import ENTERED, TINY

SMOKE = ["--device", "cpu", "--smoke"]


@pytest.fixture
def in_process(monkeypatch):
    """Optimizers train here: a process each costs seconds, and imports what has been imported."""
    monkeypatch.setattr(
        gpu_large, "in_subprocess", lambda contender, *_: gpu_large.train(contender, TINY, CpuDevice(), 8)
    )


def test_a_run_in_slices_is_one_file_in_the_end(in_process, tmp_path, capsys):
    run = [*SMOKE, "--out", str(tmp_path)]
    assert gpu_large.main([*run, "--time-limit", "0.001"]) == 0
    assert "optimizers are left" in capsys.readouterr().out
    assert not list(tmp_path.glob("large-*.json"))
    assert gpu_large.main(run) == 0
    (path,) = tmp_path.glob("*")
    written = json.loads(path.read_text())
    assert written["smoke"] and written["device"]["type"] == "cpu"
    rows = {row["contender"]: row for row in written["rows"]}
    assert list(rows) == [contender.name for contender in ENTERED]
    ours = rows["ours, bfloat16, 8-bit states"]
    assert gpu_large.ran(ours) and len(ours["losses"]) >= gpu_large.STEPS
    assert all(torch.isfinite(torch.tensor(ours["losses"])))
    assert 2 < ours["state_bytes_per_parameter"] < 4.2
    assert rows["EPI as published, bfloat16"]["state_bytes_per_parameter"] == pytest.approx(13, abs=0.01)
    assert ours["refresh_ms"]["p50"] > 0
    assert status.line(tmp_path) == "**GPU status:** never run.", "it is no run of the device tests"


def test_one_optimizer_in_a_process_of_its_own():
    (contender,) = [contender for contender in ENTERED if contender.name == "ours, bfloat16"]
    row = gpu_large.in_subprocess(contender, "Llama-3-8B", "cpu", True)
    assert gpu_large.ran(row) and row["parameters"] > 0


def test_out_of_memory_is_a_row(monkeypatch):
    def too_large(config, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 29.90 GiB.\nMore.")

    monkeypatch.setattr(gpu_large, "build", too_large)
    row = gpu_large.train(ENTERED[0], TINY, CpuDevice(), 8)
    assert row == {
        "parameters": 0,
        "skipped": "out of memory: CUDA out of memory. Tried to allocate 29.90 GiB.",
    }
    assert "out of memory" in gpu_large.outcome(row)


def test_no_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(gpu_device, "open_device", lambda name: "torch sees no CUDA device")
    assert gpu_large.main([]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_a_cpu_has_no_figures():
    with pytest.raises(SystemExit):
        gpu_large.main(["--device", "cpu"])
