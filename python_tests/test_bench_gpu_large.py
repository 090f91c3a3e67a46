"""make gpu-large without a GPU: its slices, its rows, what runs out of memory."""

from __future__ import annotations

import faulthandler
import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gpu_device, gpu_large, status
from bench.gpu_device import CpuDevice
from bench.gpu_large import ENTERED, TINY
from bench.published_epi import PublishedEPI

SMOKE = ["--device", "cpu", "--smoke"]
NAMED = {contender.name: contender for contender in ENTERED}
OURS, EPI = NAMED["ours, bfloat16"], NAMED["EPI as published, bfloat16"]


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
    row = gpu_large.in_subprocess(OURS, "Llama-3-8B", "cpu", True, 300.0)
    assert gpu_large.ran(row) and row["parameters"] > 0


# --- processes that end otherwise: a shell stands in for the interpreter ------------------------------------------


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Puts a script of the shell in the place of the process of an optimizer, whose row goes to "$row"."""

    def put(script: str) -> None:
        path = tmp_path / "child"
        find = 'while [ $# -gt 0 ]; do if [ "$1" = --result ]; then row=$2; fi; shift; done'
        path.write_text(f"#!/bin/sh\n{find}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(gpu_large.sys, "executable", str(path))

    return put


def in_subprocess(seconds: float = 60.0) -> dict:
    return gpu_large.in_subprocess(OURS, "Llama-3-8B", "cpu", True, seconds)


def test_what_a_library_prints_does_not_break_the_row(child):
    child(
        """printf '{"parameters": 7}' > "$row"; echo; echo "Thanks for using a library!"; echo '{"parameters": 8}'"""
    )
    assert in_subprocess() == {"parameters": 7}


def test_a_row_that_was_written_counts_whatever_happens_at_the_end(child):
    child("""printf '{"parameters": 7}' > "$row"; kill -SEGV $$""")
    assert in_subprocess() == {"parameters": 7}


def test_how_a_process_without_a_row_ended_is_said(child):
    child("kill -KILL $$")
    assert in_subprocess() == {
        "skipped": "killed by SIGKILL (the host's memory, most likely): it said nothing"
    }
    child("echo no such kernel >&2; exit 3")
    assert in_subprocess() == {"skipped": "exited 3 without a result: no such kernel"}
    child("exit 0")
    assert in_subprocess() == {"skipped": "exited 0 without a result: it said nothing"}


def test_a_process_that_hangs_is_stopped(child):
    child("exec sleep 60")
    begun = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        in_subprocess(0.2)
    assert time.monotonic() - begun < 30


def test_an_optimizer_that_never_ends_is_a_row_and_the_others_are_measured(monkeypatch, tmp_path):
    def trains(contender, model, device, smoke, seconds):
        if contender is OURS:
            raise subprocess.TimeoutExpired("training", seconds)
        return {"skipped": "not in this test"}

    monkeypatch.setattr(gpu_large, "in_subprocess", trains)
    assert gpu_large.main([*SMOKE, "--out", str(tmp_path), "--time-limit", "0.001"]) == 0
    assert gpu_large.main([*SMOKE, "--out", str(tmp_path)]) == 1, "one of ours failed"
    (path,) = tmp_path.glob("large-*.json")
    rows = {row["contender"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows.keys() == NAMED.keys()
    assert rows[OURS.name]["error"].startswith("begun 2 times and never finished: stopped after ")
    assert rows[EPI.name]["skipped"] == "not in this test"


def test_the_process_of_an_optimizer_ends_itself_when_its_parent_is_gone(monkeypatch, tmp_path):
    ends = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda s, exit: ends.append((s, exit)))
    monkeypatch.setattr(gpu_large, "train", lambda *_: {"parameters": 1})
    result: Path = tmp_path / "row.json"
    arguments = ["--one", OURS.slug, "--result", str(result), "--seconds", "7"]
    assert gpu_large.main([*SMOKE, *arguments]) == 0
    assert ends == [(7 + gpu_large.GRACE, True)] and json.loads(result.read_text()) == {"parameters": 1}


# --- memory -------------------------------------------------------------------------------------------------------


def test_epi_as_published_is_expected_to_run_out_of_memory(monkeypatch):
    def too_large(params):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    row = gpu_large.train(replace(EPI, make=too_large), TINY, CpuDevice(), 8)
    need = row["parameters"] * 25 / 1e9  # 2 + 2 + 13 + 8 bytes
    expected = (
        f"out of memory, as expected (weights, gradients, state and a refresh are {need:.4g} GB): CUDA out"
    )
    assert row["skipped"].startswith(expected)
    assert row["skipped"] in gpu_large.outcome(row)
    ours = gpu_large.train(replace(OURS, make=too_large), TINY, CpuDevice(), 8)
    assert ours["skipped"] == "out of memory: CUDA out of memory."


def test_a_refresh_that_runs_out_of_memory_leaves_the_steps():
    class NoRoom(PublishedEPI):
        def refresh(self):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    row = gpu_large.train(replace(EPI, make=NoRoom), TINY, CpuDevice(), 8)
    assert row["step_ms"]["p50"] > 0 and "refresh_ms" not in row and "skipped" not in row
    assert row["refresh_skipped"].startswith("out of memory, as expected")
    assert "refresh out of memory" in gpu_large.outcome(row)


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


@pytest.mark.parametrize(
    ("reason", "status"), [(f"{gpu_large.OUT_OF_MEMORY}: CUDA out of memory.", 0), ("killed", 1)]
)
def test_ours_that_a_card_is_too_small_for_are_no_failure(reason, status, monkeypatch, tmp_path):
    """On 80 GB some of ours do not fit, by `epi-kernels memory`."""
    monkeypatch.setattr(gpu_large, "in_subprocess", lambda *_: {"skipped": reason})
    assert gpu_large.main([*SMOKE, "--out", str(tmp_path)]) == status


def test_no_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(gpu_device, "open_device", lambda name: "torch sees no CUDA device")
    assert gpu_large.main([]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_a_cpu_has_no_figures():
    with pytest.raises(SystemExit):
        gpu_large.main(["--device", "cpu"])
