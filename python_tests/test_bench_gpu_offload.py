"""make gpu-offload without a GPU: its slices, its rows, what does not fit."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
import torch

from bench import gpu_large, gpu_offload
from bench.gpu_device import CpuDevice
from bench.gpu_large import SMOKE_TOKENS, TINY

SMOKE = ["--device", "cpu", "--smoke"]
OFFLOADED, EXACT, RESIDENT, TORCHAO = gpu_offload.ARMS


@pytest.fixture
def in_process(monkeypatch):
    """Arms train here: a process each costs seconds, and imports what has been imported."""
    monkeypatch.setattr(
        gpu_offload,
        "in_subprocess",
        lambda arm, args, seconds: gpu_offload.train(arm, TINY, CpuDevice(), SMOKE_TOKENS, args.card),
    )
    # it wants a GPU, and seconds to be imported, where nobody has yet
    for name in ("torchao", "torchao.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    tested = {"run": 1, "failures": [], "skipped": {}}
    monkeypatch.setattr(gpu_offload, "run_pytest", lambda arguments, _: {"arguments": arguments, **tested})


def test_a_run_in_slices_is_one_file_in_the_end(in_process, tmp_path, capsys):
    run = [*SMOKE, "--out", str(tmp_path)]
    assert gpu_offload.main([*run, "--time-limit", "0.001"]) == 0
    assert "slices are left" in capsys.readouterr().out
    assert not list(tmp_path.glob("offload-*.json"))
    assert gpu_offload.main(run) == 0
    (path,) = tmp_path.glob("*")
    written = json.loads(path.read_text())
    assert written["smoke"] and written["card_gb"] == 24 and "cpu" in written["tests"]["arguments"]
    rows = {row["arm"]: row for row in written["rows"]}
    assert list(rows) == [arm.name for arm in gpu_offload.ARMS]
    ours, exact, resident = (rows[arm.name] for arm in (OFFLOADED, EXACT, RESIDENT))
    assert ours["losses"] == resident["losses"] and ours["losses"][-1] < ours["losses"][0] + 1
    assert ours["state_bytes"] == resident["state_bytes"]
    assert exact["state_bytes"] == ours["state_bytes"] + 2 * exact["parameters"]
    assert ours["training_step_ms"]["p50"] >= ours["until_backward_returns_ms"]["p50"] > 0
    assert ours["tokens_per_s"] > 0 and ours["refresh_ms"] > 0
    assert "torchao" in rows[TORCHAO.name]["skipped"]


def test_one_arm_in_a_process_of_its_own(monkeypatch):
    """Its command, run here."""

    def run(command, **options):
        assert command[1:3] == ["-m", "bench.gpu_offload"] and options["timeout"] == 60.0
        assert "expandable_segments" in options["env"]["PYTORCH_ALLOC_CONF"]
        return subprocess.CompletedProcess(command, gpu_offload.main(command[3:]), "", "")

    monkeypatch.setattr(gpu_large.subprocess, "run", run)
    monkeypatch.setattr(gpu_large.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    args = argparse.Namespace(model="Llama-3-8B", card=24.0, device="cpu", smoke=True)
    row = gpu_offload.in_subprocess(OFFLOADED, args, 60.0)
    assert gpu_large.ran(row) and row["parameters"] > 0 and row["peak_bytes"] is None


def test_ours_offloaded_has_to_fit(in_process, monkeypatch, tmp_path, capsys):
    def too_large(config, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 29.90 GiB.\nMore.")

    monkeypatch.setattr(gpu_offload, "build", too_large)
    assert gpu_offload.main([*SMOKE, "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.count(f"{OFFLOADED.name}: out of memory") == 1 and f"{RESIDENT.name}: out" not in said


def test_no_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr("bench.gpu_device.open_device", lambda name: "torch sees no CUDA device")
    assert gpu_offload.main([]) == 2
    assert "make gpu-offload: no GPU here: torch sees no CUDA device" in capsys.readouterr().err
