"""A run stopped anywhere, by a signal or a kill, and resumed, ends with the bits of one never stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from epi_kernels.finetune import checkpoint, log, train
from epi_kernels.finetune import command as finetune
from python_tests.stopped_runs import (
    STEPS,
    arguments,
    assert_same_end,
    resume,
    signalled,
    stopped_run,
    story,
    tree,
    whole_run,
    write_inputs,
)
from python_tests.tiny_model import command, qa, save_tiny, write_jsonl

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    return whole_run(files, tmp_path_factory.mktemp("undisturbed") / "out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(
    files, undisturbed, tmp_path, capsys, number, stop
):
    out = tmp_path / "out dir"
    before = signal.getsignal(number)
    with signalled(stop - 1, number):
        assert command(finetune, *arguments(files, out)) == 128 + number
    assert signal.getsignal(number) == before
    text = capsys.readouterr().out
    assert f"interrupted after step {stop} of {STEPS}" in text
    assert f"epi-kernels finetune --out '{out}' --resume" in text
    assert checkpoint.load_state(checkpoint.list_checkpoints(out)[-1])["step"] == stop
    assert not (out / "model.safetensors").exists()
    assert resume(out) == 0
    assert_same_end(out, undisturbed)
    assert [event for event in story(out) if event["event"] != "checkpoint"] == [
        event for event in story(undisturbed) if event["event"] != "checkpoint"
    ]


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from epi_kernels.finetune import checkpoint, command, train
from python_tests.tiny_model import command as run
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
place, at = {place!r}, {at}
if place == "step":
    step = train.Run.step
    train.Run.step = lambda self, index: die() if index == at else step(self, index)
elif place == "before rename":
    rename, calls = os.rename, []
    def patched(source, target):
        calls.append(1)
        return die() if len(calls) == at else rename(source, target)
    os.rename = patched
elif place == "optimizer half written":
    import torch
    save, calls = torch.save, []
    def patched(value, path):
        save(value, path)
        calls.append(1)
        if len(calls) == at:
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    torch.save = patched
sys.exit(run(command, *{arguments!r}))
"""


@pytest.mark.parametrize(
    "place, at, resumes_from",
    [
        ("step", 7, 6),
        ("before rename", 2, 3),
        ("optimizer half written", 2, 3),
    ],
    ids=lambda value: str(value).replace(" ", "-"),
)
def test_a_kill_at_any_point_resumes_to_the_same_bits(files, undisturbed, tmp_path, place, at, resumes_from):
    out = tmp_path / "out"
    code = KILLED.format(
        root=str(ROOT), place=place, at=at, arguments=[str(one) for one in arguments(files, out)]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    steps = [checkpoint.load_state(path)["step"] for path in checkpoint.list_checkpoints(out)]
    assert max(steps, default=0) == resumes_from
    assert resume(out) == 0
    assert_same_end(out, undisturbed)
    assert not list(out.rglob("*partial*"))
    assert json.loads((out / "done.json").read_text())["step"] == STEPS


class Killed(BaseException):
    """Ends the command at once where nothing cleans up: as good as a kill, and faster to test."""


def test_a_run_killed_before_its_first_checkpoint_starts_again(files, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    step = train.Run.step

    def killed(self, index):
        if index == 2:
            raise Killed
        return step(self, index)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(train.Run, "step", killed)
        command(finetune, *arguments(files, out))
    assert len(log.read(out / "log.jsonl")) > 2
    assert resume(out) == 0
    assert_same_end(out, undisturbed)
    assert story(out) == story(undisturbed)


def test_a_run_killed_before_it_removes_old_checkpoints_does_it_later(
    files, undisturbed, tmp_path, monkeypatch
):
    out = tmp_path / "out"

    def killed(run_dir, keep):
        if len(checkpoint.list_checkpoints(run_dir)) == 3:  # the last step's, too
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(checkpoint, "prune", killed)
        command(finetune, *arguments(files, out))
    assert resume(out) == 0
    assert_same_end(out, undisturbed)
    assert [path.name for path in checkpoint.list_checkpoints(out)] == [
        path.name for path in checkpoint.list_checkpoints(undisturbed)
    ]


def test_a_run_killed_while_it_puts_the_model_in_place_finishes_it(files, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    replace = os.replace

    def killed(source, target):
        replace(source, target)
        if Path(target).name == "config.json":
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(os, "replace", killed)
        command(finetune, *arguments(files, out))
    assert (out / "config.json").exists() and not (out / "model.safetensors").exists()
    (out / ".partial-model.safetensors").write_bytes(b"half")
    (out / "checkpoints" / ".partial-probe").write_bytes(b"half")
    assert resume(out) == 0
    assert_same_end(out, undisturbed)
    assert not list(out.rglob("*partial*"))


def test_a_run_killed_while_it_writes_its_first_file_begins_again(files, undisturbed, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json.partial").write_text('{"version": 1')
    assert resume(out) == 2
    assert "no run to resume" in capsys.readouterr().err
    (out / "precious").write_text("not ours")
    assert command(finetune, *arguments(files, out)) == 2
    (out / "precious").unlink()
    assert command(finetune, *arguments(files, out)) == 0
    assert_same_end(out, undisturbed)
    assert not list(out.rglob("*partial*"))


@pytest.mark.parametrize("content", ["", "[]", '{"step": 1', '{"step": 9}'])
def test_an_unreadable_done_is_no_end(files, undisturbed, tmp_path, content):
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    (out / "done.json").write_text(content)
    assert resume(out) == 0
    assert (out / "done.json").read_text() == (undisturbed / "done.json").read_text()
    assert_same_end(out, undisturbed)


def test_a_bfloat16_run_from_a_config_resumes_with_the_buffers_it_had(files, tmp_path):
    """Rotary embeddings stay float32 in the model that is made from the config, as in the one that is loaded."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert command(finetune, *arguments(files, whole, "--dtype", "bf16")) == 0
    with signalled(3):
        assert command(finetune, *arguments(files, out, "--dtype", "bf16")) == 130
    assert resume(out) == 0
    assert_same_end(out, whole)


def test_a_resumed_comparison_goes_on_where_it_was(files, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert command(finetune, *arguments(files, whole, "--compare")) == 0
    with signalled(4, label="adamw"):
        assert command(finetune, *arguments(files, out, "--compare")) == 130
    assert (out / "done.json").exists() and not (out / "adamw" / "done.json").exists()
    trained = os.stat(out / "model.safetensors").st_mtime_ns
    assert resume(out) == 0
    assert os.stat(out / "model.safetensors").st_mtime_ns == trained
    for folder in (".", "adamw"):
        assert_same_end(out / folder, whole / folder)


def test_a_signal_in_the_last_step_stops_before_the_comparison(files, tmp_path):
    out = tmp_path / "out"
    with signalled(STEPS - 1):
        assert command(finetune, *arguments(files, out, "--compare")) == 130
    assert (out / "done.json").exists() and not (out / "adamw").exists()
    assert resume(out) == 0
    assert (out / "adamw" / "done.json").exists()


@pytest.fixture
def stopped(files, tmp_path):
    return stopped_run(files, tmp_path)


def test_resume_refuses_other_arguments_data_or_weights_by_name(stopped, capsys):
    files, out = stopped
    before = tree(out)

    def refused(*more):
        capsys.readouterr()
        assert resume(out, *more) == 2
        assert tree(out) == before
        return capsys.readouterr().err

    text = refused("--lr", 1e-4, "--mask-interval", 7)
    assert "--lr was 0.003, is 0.0001" in text and "--mask-interval was 2, is 7" in text
    assert "--no-" not in text
    assert "--data was" in refused("--data", files / "old.jsonl")
    lines = (files / "qa.jsonl").read_text()
    (files / "qa.jsonl").write_text(lines.replace("It is 2.", "It is 3."))
    assert re.search(r"cannot resume: .*train data.* changed", refused())
    (files / "qa.jsonl").write_text(lines)
    (files / "old.jsonl").write_text((files / "old.jsonl").read_text().replace("It", "That"))
    assert re.search(r"cannot resume: retain data changed", refused())
    write_jsonl(files / "old.jsonl", qa(4, first=100))
    save_tiny(files / "model", seed=5)
    assert re.search(r"cannot resume: the model changed", refused())
    save_tiny(files / "model")
    shutil.move(files / "qa.jsonl", files / "gone.jsonl")
    assert "cannot be read" in refused()
    shutil.move(files / "gone.jsonl", files / "qa.jsonl")
    # What does not change the result may change, and the same arguments may be given again.
    assert resume(out, "--lr", 0.003, "--checkpoint-every", 2, "--keep-checkpoints", 1) == 0


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "no run to resume"),
        ("[]", "not an object"),
        ('{"version": 0}', "another version"),
        ('{"version": 1, "options": {}}', "lacks fingerprints, model_weights"),
    ],
)
def test_what_is_no_run_is_not_resumed(tmp_path, capsys, content, said):
    (tmp_path / "run.json").write_text(content)
    assert resume(tmp_path) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
