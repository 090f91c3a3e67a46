"""A full disk, a log cut short, old checkpoints: what a run keeps on the disk stays whole."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from epi_kernels.finetune import checkpoint, log
from epi_kernels.finetune import command as finetune
from python_tests.stopped_runs import STEPS, arguments, assert_same_end, resume, whole_run, write_inputs
from python_tests.tiny_model import command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    return whole_run(files, tmp_path_factory.mktemp("undisturbed") / "out")


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["weights", "optimizer", "sync"])
def test_a_full_disk_keeps_the_checkpoint_before_and_the_run_goes_on(
    files, undisturbed, tmp_path, monkeypatch, capsys, what
):
    out = tmp_path / "out"
    module, name = {
        "weights": (checkpoint, "save_pretrained"),
        "optimizer": (torch, "save"),
        "sync": (os, "rename"),
    }[what]
    original, calls = getattr(module, name), []

    def second_fails(*arguments):
        calls.append(1)
        if len(calls) != 2:
            return original(*arguments)
        if what == "weights":
            (arguments[2] / "model.safetensors").write_bytes(b"half")
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
        if what == "optimizer":
            # torch's own error, which does not say why; the disk is full when it is asked.
            monkeypatch.setattr(checkpoint, "_probe", no_space)
            return original(arguments[0], "/dev/full")
        return no_space()

    monkeypatch.setattr(module, name, second_fails)
    assert command(finetune, *arguments(files, out)) == 0
    text = capsys.readouterr().err
    assert "checkpoint of step 6 not written: no space left" in text
    assert "the checkpoint of step 3 is whole" in text
    assert [
        event["step"] for event in log.read(out / "log.jsonl") if event["event"] == "checkpoint_failed"
    ] == [6]
    assert not list(out.rglob("*partial*"))
    assert_same_end(out, undisturbed)


@pytest.mark.parametrize("room", ["for the model", "for nothing"])
def test_a_disk_full_at_the_end_keeps_the_checkpoint_before_and_the_model(
    files, undisturbed, tmp_path, monkeypatch, capsys, room
):
    out = tmp_path / "out"
    sync = checkpoint.sync

    def full(path):
        if f"{STEPS:08d}" in str(path) or (room == "for nothing" and "-model" in str(path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "sync", full)
        assert command(finetune, *arguments(files, out)) == 1
    text = capsys.readouterr().err
    assert (
        "the checkpoint of step 6 is whole" in text and "free some space, then continue with --resume" in text
    )
    assert [checkpoint.load_state(path)["step"] for path in checkpoint.list_checkpoints(out)] == [3, 6]
    assert ("the trained model is in" in text) == (room == "for the model")
    if room == "for the model":
        assert (out / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert not list(out.rglob("*partial*")) and (out / "model.safetensors").exists() == (
        room == "for the model"
    )
    assert resume(out) == 0
    assert_same_end(out, undisturbed)


def test_log_lines_wait_while_the_disk_is_full(tmp_path, monkeypatch):
    one = log.Log(tmp_path / "log.jsonl")
    one.write("start", step=0)
    with monkeypatch.context() as patched:

        def full(*_):
            raise OSError(errno.ENOSPC, "full")

        patched.setattr("builtins.open", full)
        one.write("step", step=1)
    one.write("step", step=2, loss=float("nan"))
    events = log.read(tmp_path / "log.jsonl")
    assert [event["step"] for event in events] == [0, 1, 2]
    assert events[2]["loss"] == "nan"


def test_what_a_kill_left_of_a_line_is_cut_on_resume(tmp_path):
    path = tmp_path / "log.jsonl"
    one = log.Log(path)
    one.write("start", step=0)
    length = one.flush(sync=True)
    one.write("step", step=1)
    with open(path, "ab") as file:
        file.write(b'{"event": "st')
    assert [event["event"] for event in log.read(path)] == ["start", "step"]
    log.Log(path, keep_bytes=length).write("resume", step=0)
    assert [event["event"] for event in log.read(path)] == ["start", "resume"]


def test_old_checkpoints_are_removed(files, tmp_path):
    out = tmp_path / "out"
    assert command(finetune, *arguments(files, out, "--checkpoint-every", 1, "--keep-checkpoints", 3)) == 0
    kept = [checkpoint.load_state(path)["step"] for path in checkpoint.list_checkpoints(out)]
    assert kept == [STEPS - 2, STEPS - 1, STEPS]
    assert len(list((out / "checkpoints").iterdir())) == 3
