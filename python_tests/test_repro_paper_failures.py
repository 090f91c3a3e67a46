"""What goes wrong with the paper preset at toy size: it is said in a line, and the same command goes on."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from epi_kernels.repro import execute, output, stages, sweep, workshop
from epi_kernels.repro import train as train_
from epi_kernels.repro.config import TaskSpec
from epi_kernels.repro.preset import load_preset
from epi_kernels.repro.runs import Train, key, parents
from epi_kernels.repro.store import MANIFEST, Store
from epi_kernels.repro.tables import TABLES
from epi_kernels.repro.tasks import judge, make_task
from epi_kernels.repro.tasks.chat import Judged
from epi_kernels.repro.tasks.gsm8k import Gsm8k
from python_tests.judge_endpoint import endpoint
from python_tests.paper_fixtures import write_all
from python_tests.paper_preset import make_checkpoints, paper, toy, written
from python_tests.paper_runs import GOOD, LLAMA, manifests, one_arm, reproduce, runs_of, stamped


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("data"), 32)


@pytest.fixture(scope="module")
def models(tmp_path_factory, data) -> dict[str, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("models"), data, [LLAMA, "Gemma-9B"])


@pytest.fixture(scope="module")
def url():
    with endpoint([GOOD]) as (address, _):
        yield address


def test_an_unknown_table_names_those_there_are(tmp_path, models, data, url, capsys):
    path = written(one_arm(models, data, url), tmp_path / "p.yaml")
    assert reproduce(path, tmp_path / "out", "--table", "cpift-9") == 2
    assert "cpift-9: no such table; there are frontier" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", [(), ("sequential",), ("tasks", "alpaca", "judge")])
def test_an_unknown_key_is_named(tmp_path, models, data, url, capsys, where):
    preset = one_arm(models, data, url)
    inner = preset
    for name in where:
        inner = inner[name]
    inner["sheed"] = 1
    assert reproduce(written(preset, tmp_path / "p.yaml"), tmp_path / "out") == 2
    assert ".".join((*where, "sheed")) in capsys.readouterr().err


def test_arms_are_left_out_by_name(tmp_path, models, data, url, capsys):
    path = written(toy({LLAMA: models[LLAMA]}, data, url), tmp_path / "p.yaml")
    assert reproduce(path, tmp_path / "out", "--dry-run", "--without", "MoFO", "EPI as published") == 0
    assert load_preset(str(path)).without(["MoFO"]).sequential.arms.keys() == paper()["sequential"][
        "arms"
    ].keys() - {"MoFO"}
    assert reproduce(path, tmp_path / "out", "--dry-run", "--without", "MOFO") == 2
    assert "no such arm; there are EPI," in capsys.readouterr().err
    assert reproduce(path, tmp_path / "out", "--dry-run", "--without", "EPI") == 2
    assert "the sweep is of that arm" in capsys.readouterr().err


def test_a_dataset_folder_with_a_missing_field(tmp_path, models, data, url, capsys):
    preset, folder = one_arm(models, data, url), tmp_path / "gsm8k"
    folder.mkdir()
    for path in data["gsm8k"].iterdir():
        lines = path.read_text().splitlines()
        if path.name == "train.jsonl":
            lines[4] = json.dumps({"question": "How many?"})
        (folder / path.name).write_text("\n".join(lines))
    preset["tasks"]["gsm8k"]["source"] = str(folder)
    assert reproduce(written(preset, tmp_path / "p.yaml"), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{folder / 'train.jsonl'}:5" in error and '"answer"' in error and "expected" in error
    assert not manifests(tmp_path / "out")


def test_a_slow_tokenizer_is_refused_by_name(tmp_path, models, data, url, capsys):
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    preset = one_arm(models, data, url)
    preset["models"][LLAMA]["tokenizer"] = str(tmp_path / "slow")
    assert reproduce(written(preset, tmp_path / "p.yaml"), tmp_path / "out") == 2
    assert "ByT5Tokenizer gives no character offsets; use a fast tokenizer" in capsys.readouterr().err


def test_a_judge_that_goes_down_costs_nothing(tmp_path, models, data, capsys, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(judge, "time", SimpleNamespace(sleep=waited.append))
    for task in (Gsm8k, Judged):
        monkeypatch.setattr(task, "max_new_tokens", 4)  # of a model that is broken on purpose
    out = tmp_path / "out"
    rated = len(make_task(TaskSpec(kind="alpaca", source=str(data["alpaca"]))).examples("test"))
    replies = [GOOD] * rated + [(503, {"error": "busy"})]
    with endpoint(replies) as (address, _):
        preset = one_arm(models, data, address)
        # The first one's answers are others than those that were rated before.
        preset["sequential"]["full_lrs"] = [0.5, 1e-4]
        path = written(preset, tmp_path / "p.yaml")
        assert reproduce(path, out) == 2
        error = capsys.readouterr().err
        assert "failed 2 times" in error and "503" in error and "start the same command again" in error
        assert len(waited) == 1 and waited[0] <= 1.5 * judge.FIRST_WAIT
        before = manifests(out)
        assert len(before) == 2  # the model, and the first stage
        (progress,) = (out / "runs").glob("*.progress")
        assert torch.load(progress, weights_only=True)["step"] == 3  # its training is not lost
        replies[:] = [GOOD]
        assert reproduce(path, out) == 0
    after = manifests(out)
    assert len(after) == 5 and before.items() <= after.items()
    assert not list((out / "runs").glob("*.progress"))


def no_room(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["weights", "importance", "progress", "page"])
def test_a_full_disk_keeps_what_is_done(tmp_path, models, data, url, capsys, monkeypatch, what):
    out, path = tmp_path / "out", written(one_arm(models, data, url), tmp_path / "p.yaml")
    with monkeypatch.context() as full:
        if what == "weights":
            full.setattr(PreTrainedTokenizerBase, "save_pretrained", no_room)
        elif what == "importance":
            full.setattr(workshop, "save_isolation", no_room)
        elif what == "progress":
            full.setattr(sweep, "Limits", partial(train_.Limits, save_every_s=0.0))
            full.setattr(train_.torch, "save", no_room)
        else:
            full.setattr(output, "write_page", no_room)
        assert reproduce(path, out, "--table", "cpift-2") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert ("No space left" if what == "page" else "no space left") in error
    assert "run the same command again" in error
    before = manifests(out)
    assert len(before) == {"weights": 0, "importance": 1, "progress": 1, "page": 5}[what]
    left = {path.name for path in (out / "runs").iterdir()}
    assert not [name for name in left if "partial" in name]
    assert reproduce(path, out, "--table", "cpift-2") == 0
    assert before.items() <= manifests(out).items() and len(manifests(out)) == 5


def test_a_device_that_is_too_small(tmp_path, models, data, url, capsys, monkeypatch):
    def too_large(*_: Any, **__: Any):
        raise torch.OutOfMemoryError("CUDA out of memory")

    out, path = tmp_path / "out", written(one_arm(models, data, url), tmp_path / "p.yaml")
    monkeypatch.setattr(stages, "make_method", too_large)
    assert reproduce(path, out) == 2
    error = capsys.readouterr().err
    assert "by full on gsm8k, seed 1" in error and "--without" in error
    assert len(manifests(out)) == 1


def test_a_checkpoint_of_another_architecture_in_a_fusion(tmp_path, models, data, url, capsys):
    preset = toy({LLAMA: models[LLAMA]}, data, url, tables=["cpift-3"])
    for plan in ("sequential", "imbalance", "drift", "sweep"):
        del preset[plan]
    preset["tasks"] = {name: preset["tasks"][name] for name in ("gsm8k", "logiqa")}
    preset["mixture"] |= {
        "tasks": ["gsm8k", "logiqa"],
        "heuristic": [["gsm8k"], ["logiqa"]],
        "random_stages": 2,
    }
    path, out = written(preset, tmp_path / "p.yaml"), tmp_path / "out"
    run = TABLES["cpift-3"].runs(stamped(path))[0]
    shop = workshop.Workshop(Store(out / "runs"), torch.device("cpu"), keep=frozenset(map(key, parents(run))))
    for probe in run.probes:
        execute.ensure(probe, shop)
    wrong = shop.store.at(run.probes[1]) / "model.safetensors"
    shutil.copy(models["Gemma-9B"] / "model.safetensors", wrong)
    before = manifests(out)
    assert reproduce(path, out) == 2
    error = capsys.readouterr().err
    assert "of another architecture than" in error and str(wrong.parent) in error and "kept" in error
    assert before.items() <= manifests(out).items()


def test_a_sweep_that_is_killed_goes_on_to_the_same_bits(tmp_path, models, data, url):
    preset = one_arm(models, data, url)
    preset["sequential"]["pairs"][0]["learn"] |= {"steps": 20, "lr": 1e-6}
    path = written(preset, tmp_path / "p.yaml")
    plan, out = runs_of(path), tmp_path / "killed"
    learn = next(name for name, run in plan.runs.items() if isinstance(run, Train))
    command = [sys.executable, "-m", "epi_kernels", "reproduce", "--preset", str(path), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--device", "cpu", "--workers", "1"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 120
        while not (out / "runs" / f"{learn}.lock").is_file():
            assert process.poll() is None and time.monotonic() < until, (
                "the sweep did not get to the first stage"
            )
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = manifests(out)
    assert 1 <= len(done) < len(plan.runs)
    assert reproduce(path, out) == 0
    assert reproduce(path, tmp_path / "whole") == 0
    assert done.items() <= manifests(out).items()
    for name in plan.keep:
        files = [
            load_file(folder / "runs" / name / "model.safetensors") for folder in (out, tmp_path / "whole")
        ]
        assert files[0].keys() == files[1].keys() and all(
            torch.equal(files[0][one], files[1][one]) for one in files[0]
        )
    scores = [
        [one.scores for one in plan.manifests(Store(folder / "runs")).values()]
        for folder in (out, tmp_path / "whole")
    ]
    assert scores[0] == scores[1]


def test_ctrl_c_ends_with_a_line_and_the_same_command_goes_on(
    tmp_path, models, data, url, capsys, monkeypatch
):
    out, path = tmp_path / "out", written(one_arm(models, data, url), tmp_path / "p.yaml")
    factor, calls = train_.lr_factor, []

    def pressed(*arguments: Any) -> float:
        calls.append(arguments)
        if len(calls) == 9:  # of two groups a step: in the second run of three steps
            signal.raise_signal(signal.SIGINT)
        return factor(*arguments)

    # A shell's background job begins with the signal ignored, and Python then leaves it so.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(train_, "lr_factor", pressed)
            assert reproduce(path, out) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "interrupted" in capsys.readouterr().err
    before = manifests(out)
    assert len(before) == 2
    assert reproduce(path, out) == 0
    assert before.items() <= manifests(out).items() and len(manifests(out)) == 5


def test_a_manifest_of_an_older_version_is_named_before_anything_is_made(tmp_path, models, data, url, capsys):
    out, path = tmp_path / "out", written(one_arm(models, data, url), tmp_path / "p.yaml")
    plan = runs_of(path)
    learn = next(name for name, run in plan.runs.items() if isinstance(run, Train))
    old = out / "runs" / learn
    old.mkdir(parents=True)
    (old / MANIFEST).write_text(json.dumps({"key": learn, "schema": 0, "score": 1.0}))
    assert reproduce(path, out) == 2
    assert f"{old / MANIFEST}: is no manifest of this version" in (error := capsys.readouterr().err)
    assert f"remove {old}" in error and len(manifests(out)) == 1
    shutil.rmtree(old)
    assert reproduce(path, out, "--dry-run") == 0
