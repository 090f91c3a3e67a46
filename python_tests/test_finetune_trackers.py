"""The scalars of `finetune`'s log reach TensorBoard and W&B, each step once, stopped and resumed too."""

from __future__ import annotations

import importlib.util
import shutil
import sys

import pytest

from epi_kernels.finetune import command as finetune
from epi_kernels.finetune import trackers
from python_tests.finetune_runs import events
from python_tests.rank_runs import started
from python_tests.stopped_runs import STEPS, arguments, resume, signalled, write_inputs
from python_tests.tiny_model import command
from python_tests.tracked_runs import (
    assert_same,
    curves,
    of_tensorboard,
    of_the_log,
    offline_rows,
    recording,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("files"))


def test_the_logs_scalars_are_in_the_event_files_by_default_and_once_after_a_resume(files, tmp_path):
    """Killed after step 7 with a checkpoint of step 3: steps 4 to 7 come twice."""
    out = tmp_path / "out"
    with signalled(6):
        assert command(finetune, *arguments(files, out, "--compare")) == 130
    for step in (6, 7):  # as if they had never been whole: killed before
        shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")
    assert resume(out) == 0
    wanted = of_the_log(out)
    assert_same(of_tensorboard(out), wanted)
    assert list(wanted["train/loss"]) == list(range(1, STEPS + 1))
    assert list(wanted["isolation/share"]) == [2, 4, 6, 8] and min(wanted["isolation/share"].values()) > 0.09
    assert {"train/lr", "train/grad_norm", "eval/retain_loss", "isolation/jaccard"} < wanted.keys()
    plain = of_the_log(out / "adamw")
    assert_same(of_tensorboard(out / "adamw"), plain)
    assert "isolation/share" not in plain


@pytest.mark.parametrize("given", [["--log-to", "none"], []], ids=["none", "not installed"])
def test_without_trackers_there_is_the_log_alone(files, tmp_path, monkeypatch, capsys, given):
    if not given:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *more: None if name == "tensorboard" else find(name, *more),
        )
    out = tmp_path / "out"
    assert command(finetune, *arguments(files, out, *given, "--max-steps", 1)) == 0
    assert len(events(out, "step")) == 1 and not list(out.rglob("*tfevents*"))
    assert "tensorboard" not in "".join(capsys.readouterr()).lower()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_what_is_asked_for_and_not_installed_is_refused_before_anything_starts(
    files, tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setattr(trackers, "_installed", lambda asked: asked != name)
    assert command(finetune, *arguments(files, tmp_path / "out", "--log-to", name)) == 2
    assert f"--log-to {name}: the package is not installed: pip install {name}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert command(finetune, *arguments(files, tmp_path / "out", "--log-to", "none", name)) == 2
    assert "none goes with no other" in capsys.readouterr().err


def test_a_tensorboard_that_cannot_be_imported_costs_no_run_that_did_not_ask_for_it(
    files, tmp_path, monkeypatch, capsys
):
    """Installed, and beside another version of something that it needs."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    asked, out = tmp_path / "asked", tmp_path / "out"
    assert command(finetune, *arguments(files, asked, "--log-to", "tensorboard")) == 1
    assert "--log-to tensorboard: import of torch.utils.tensorboard halted" in capsys.readouterr().err
    assert command(finetune, *arguments(files, out, "--max-steps", 1)) == 0
    assert "tensorboard gets nothing of this run: import of" in capsys.readouterr().err
    assert len(events(out, "step")) == 1


def test_wandb_gets_the_same_scalars_and_a_resume_is_the_same_run(files, tmp_path, monkeypatch):
    recorder, out = recording(monkeypatch), tmp_path / "out"
    with signalled(4):
        assert command(finetune, *arguments(files, out, "--log-to", "wandb", "tensorboard")) == 130
    assert resume(out) == 0
    first, second = recorder.runs
    assert first.given["id"] == second.given["id"] and second.given["resume"] == "allow"
    assert first.given["config"]["mask_interval"] == 2 and first.given["project"] == "epi-kernels"
    assert (first.exit_code, second.exit_code) == (0, 0)
    wanted = of_the_log(out)
    assert_same(curves(first.rows + second.rows), wanted)
    assert_same(of_tensorboard(out), wanted)


def test_wandb_that_refuses_is_said_and_one_that_breaks_costs_no_run(files, tmp_path, monkeypatch, capsys):
    recorder, out = recording(monkeypatch), tmp_path / "out"
    init = recorder.init

    def refuses(**_):
        raise RuntimeError("api_key not configured")

    recorder.init = refuses
    assert command(finetune, *arguments(files, out, "--log-to", "wandb")) == 1
    assert "W&B refuses (api_key not configured); `wandb login`" in capsys.readouterr().err

    def breaks(values, step):
        raise ConnectionError("the service is gone")

    def init_broken(**given):
        run = init(**given)
        run.log = breaks
        return run

    recorder.init = init_broken
    assert command(finetune, "--out", out, "--resume") == 0
    assert "W&B gets no more of this run: the service is gone" in capsys.readouterr().err
    assert len(events(out, "step")) == STEPS


def test_wandb_itself_offline_gets_the_same_scalars(files, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # else it goes by the environment that it read first
    out = tmp_path / "out"
    assert command(finetune, *arguments(files, out, "--log-to", "wandb", "--compare")) == 0
    for folder in (out / "wandb", out / "adamw" / "wandb"):
        assert_same(curves(offline_rows(folder)), of_the_log(folder.parent))


def test_of_several_ranks_the_first_writes(files, tmp_path):
    out = tmp_path / "out"
    assert [one.status for one in started(2, *arguments(files, out, model="model"))] == [0, 0]
    assert len(list(out.rglob("*tfevents*"))) == 1
    assert_same(of_tensorboard(out), of_the_log(out))
