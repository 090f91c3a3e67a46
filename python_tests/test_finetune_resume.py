"""A run stopped anywhere, by a signal, a kill or a full disk, and resumed, ends with the bits of one never stopped."""

from __future__ import annotations

import errno
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
from python_tests.tiny_model import backend, command, qa, save_tiny, write_config, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
STEPS = 9


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_jsonl(folder / "qa.jsonl", qa(20))
    write_jsonl(folder / "old.jsonl", qa(4, first=100))
    write_config(folder, attention_dropout=0.1)
    save_tiny(folder / "model")
    return folder


def arguments(files, out, *more, model="config-tiny.json"):
    """Refreshes after steps 2, 4, ...; checkpoints after 3 and 6: masks, moments, dropout and schedule are all underway."""
    common = [
        "--max-length",
        48,
        "--batch-size",
        1,
        "--accumulation",
        2,
        "--lr",
        3e-3,
        "--max-steps",
        STEPS,
        "--quiet",
    ]
    common += [
        "--mask-interval",
        2,
        "--isolation-ratio",
        0.1,
        "--checkpoint-every",
        3,
        "--backend",
        backend(),
    ]
    return [
        "--model",
        files / model,
        "--data",
        files / "qa.jsonl",
        "--retain",
        files / "old.jsonl",
        "--out",
        out,
        *common,
        *more,
    ]


def final_state(out):
    """Weights, and everything of the optimizer, after the last step."""
    from safetensors.torch import load_file

    last = checkpoint.list_checkpoints(out)[-1]
    assert checkpoint.load_state(last)["step"] == STEPS
    optimizer = checkpoint.load_optimizer(last)["optimizer"]
    tensors = {f"{i} {name}": value for i, one in optimizer["state"].items() for name, value in one.items()}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer["param_groups"]]
    return load_file(out / "model.safetensors"), tensors, groups


def assert_same_end(out, other):
    for mine, theirs in zip(final_state(out)[:2], final_state(other)[:2], strict=True):
        assert mine.keys() == theirs.keys() and mine
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert final_state(out)[2] == final_state(other)[2]


def story(out):
    """The log without what may differ: times, and where it was resumed."""
    untold = ("time", "seconds", "options", "environment", "peak_memory_bytes")
    return [
        {key: value for key, value in event.items() if key not in untold}
        for event in log.read(out / "log.jsonl")
        if event["event"] != "resume"
    ]


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert command(finetune, *arguments(files, out)) == 0
    return out


def resume(out, *more):
    return command(finetune, "--out", out, "--resume", *more)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(
    files, undisturbed, tmp_path, monkeypatch, capsys, number, stop
):
    out = tmp_path / "out dir"
    step = train.Run.step

    def interrupted(self, index):
        if index == stop - 1:
            os.kill(os.getpid(), number)
        return step(self, index)

    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(train.Run, "step", interrupted)
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
    assert resume(out) == 0
    assert_same_end(out, undisturbed)
    assert not list(out.rglob("*partial*"))


@pytest.mark.parametrize("content", ["", "[]", '{"step": 1'])
def test_an_unreadable_done_is_no_end(files, undisturbed, tmp_path, content):
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    (out / "done.json").write_text(content)
    assert resume(out) == 0
    assert (out / "done.json").read_text() == (undisturbed / "done.json").read_text()
    assert_same_end(out, undisturbed)


def test_a_resumed_comparison_goes_on_where_it_was(files, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert command(finetune, *arguments(files, whole, "--compare")) == 0
    step = train.Run.step

    def interrupted(self, index):
        if self.label == "adamw" and index == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(train.Run, "step", interrupted)
        assert command(finetune, *arguments(files, out, "--compare")) == 130
    assert (out / "done.json").exists() and not (out / "adamw" / "done.json").exists()
    trained = os.stat(out / "model.safetensors").st_mtime_ns
    assert resume(out) == 0
    assert os.stat(out / "model.safetensors").st_mtime_ns == trained
    for folder in (".", "adamw"):
        assert_same_end(out / folder, whole / folder)


def test_a_signal_in_the_last_step_stops_before_the_comparison(files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    step = train.Run.step

    def interrupted(self, index):
        if index == STEPS - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(train.Run, "step", interrupted)
        assert command(finetune, *arguments(files, out, "--compare")) == 130
    assert (out / "done.json").exists() and not (out / "adamw").exists()
    assert resume(out) == 0
    assert (out / "adamw" / "done.json").exists()


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


def test_a_disk_full_at_the_end_loses_nothing(files, undisturbed, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    sync = checkpoint._sync

    def full(path):
        if f"{STEPS:08d}" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_sync", full)
        assert command(finetune, *arguments(files, out)) == 1
    text = capsys.readouterr().err
    assert (
        "the checkpoint of step 6 is whole" in text and "free some space, then continue with --resume" in text
    )
    assert [checkpoint.load_state(path)["step"] for path in checkpoint.list_checkpoints(out)] == [3, 6]
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


@pytest.fixture
def stopped(files, tmp_path, monkeypatch):
    """A run interrupted after step 4, whose inputs can be changed."""
    mine = tmp_path / "inputs"
    shutil.copytree(files, mine)
    out = tmp_path / "out"
    step = train.Run.step

    def interrupted(self, index):
        if index == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(train.Run, "step", interrupted)
        assert command(finetune, *arguments(mine, out, model="model")) == 130
    return mine, out


def tree(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


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


def test_a_damaged_checkpoint_is_recognised(stopped, capsys):
    _, out = stopped
    (last,) = checkpoint.list_checkpoints(out)[-1:]
    weights = last / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    assert resume(out) == 1
    assert "not those that were saved" in capsys.readouterr().err
    shutil.rmtree(last)
    assert resume(out) == 0
