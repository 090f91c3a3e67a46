"""A run's key holds what lies in the local folders it reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from repro_runs import BASE, RECIPE
from repro_tables import PRESET

from epi_kernels import cli
from epi_kernels.repro import contents as contents_
from epi_kernels.repro.config import ModelSpec, TaskSpec
from epi_kernels.repro.contents import CACHE, contents, refuse_changed, with_contents
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.preset import Preset
from epi_kernels.repro.runs import Base, Train, key


def lines(path: Path, questions: range) -> None:
    rows = [json.dumps({"question": f"{n} and 1?", "answer": f"#### {n + 1}"}) for n in questions]
    path.write_text("\n".join(rows) + "\n")


@pytest.fixture
def folder(tmp_path) -> Path:
    """GSM8K's format, and beside it a checkpoint of which nothing is loaded here."""
    data, model = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    lines(data / "train.jsonl", range(40))
    lines(data / "test.jsonl", range(50, 60))
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(100))
    return tmp_path


def of(folder: Path) -> Preset:
    task = TaskSpec(kind="gsm8k", source=str(folder / "data"))
    model = ModelSpec(checkpoint=str(folder / "model"))
    return Preset(name="local", seeds=(1,), models={"m": model}, tasks={"gsm8k": task, **PRESET.tasks})


def stamped(folder: Path) -> Preset:
    return with_contents(of(folder), contents(of(folder), folder / "runs"))


def runs(preset: Preset) -> dict[str, Train]:
    """Of the task and of the synthetic ones, from the checkpoint and from a config."""
    local, made = Base(model=preset.models["m"]), BASE
    return {
        f"{task} {name}": Train(before=base, tasks=(spec,), evaluate=(spec,), recipe=RECIPE)
        for task, spec in preset.tasks.items()
        for name, base in (("local", local), ("made", made))
    }


def changed(folder: Path, before: Preset) -> set[str]:
    now = runs(stamped(folder))
    return {name for name, run in runs(before).items() if key(run) != key(now[name])}


def test_a_key_changes_with_the_files_that_a_run_reads(folder):
    before = stamped(folder)
    assert changed(folder, before) == set()
    (folder / "data" / "README.md").write_text("nobody reads this")
    os.utime(folder / "data" / "train.jsonl", ns=(1, 1))
    assert changed(folder, before) == set(), "the same contents"
    lines(folder / "data" / "train.jsonl", range(1, 41))
    assert changed(folder, before) == {"gsm8k local", "gsm8k made"}
    before = stamped(folder)
    (folder / "model" / "model.safetensors").write_bytes(bytes(99) + b"1")
    assert changed(folder, before) == {"gsm8k local", "sums local", "strings local"}
    before = stamped(folder)
    (folder / "model" / "pytorch_model.bin").write_bytes(b"weights")
    (folder / "model" / "consolidated.safetensors").write_bytes(b"the same in another format")
    assert changed(folder, before) == {"gsm8k local", "sums local", "strings local"}
    (folder / "model" / "pytorch_model.bin").unlink()
    assert changed(folder, before) == set()
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    named = ModelSpec(checkpoint="someone/model", tokenizer=str(folder / "tokenizer"))
    assert [path.name for path in contents_.files_of(named)] == ["tokenizer.json"]


def test_what_reads_no_folder_keeps_its_key(folder):
    plain, now = runs(of(folder)), runs(stamped(folder))
    assert {name for name in plain if key(plain[name]) == key(now[name])} == {"sums made", "strings made"}
    assert contents(PRESET, folder / "runs") == {} and not (folder / "none").exists()
    assert with_contents(PRESET, {}) == PRESET
    hub = TaskSpec(kind="gsm8k", source="someone/gsm8k")
    assert contents_.files_of(hub) == [] == contents_.files_of(ModelSpec(checkpoint="someone/model"))


def test_a_file_is_hashed_once(folder, monkeypatch):
    before = stamped(folder)
    assert len(json.loads((folder / "runs" / CACHE).read_text())) == 4
    opened = []
    plain = Path.open

    def watched(path, *arguments, **options):
        opened.append(path.name)
        return plain(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", watched)
    assert stamped(folder) == before and set(opened) <= {CACHE, CACHE + ".partial"}
    os.utime(folder / "data" / "test.jsonl", ns=(1, 1))
    assert stamped(folder) == before and [name for name in opened if CACHE not in name] == ["test.jsonl"]
    (folder / "runs" / CACHE).write_text("{cut off")
    assert stamped(folder) == before


def test_large_files_are_announced(folder, monkeypatch, capsys):
    monkeypatch.setattr(contents_, "TOLD", 1)
    stamped(folder)
    assert "of local data and checkpoints, once" in capsys.readouterr().out
    stamped(folder)
    assert not capsys.readouterr().out


def test_files_that_change_under_a_sweep_are_named(folder):
    run = runs(stamped(folder))["gsm8k local"]
    refuse_changed(run, folder / "runs")
    lines(folder / "data" / "test.jsonl", range(70, 80))
    with pytest.raises(ReproError, match=r"task gsm8k, .*data: its files are no longer"):
        refuse_changed(run, folder / "runs")
    run = runs(stamped(folder))["gsm8k local"]
    (folder / "model" / "config.json").write_text("{ }")
    with pytest.raises(ReproError, match=r"model .*model: its files are no longer"):
        refuse_changed(run, folder / "runs")


def test_a_preset_may_say_which_files_it_is_of(folder):
    now = stamped(folder)
    assert with_contents(now, contents(now, folder / "runs")) == now
    lines(folder / "data" / "train.jsonl", range(30))
    with pytest.raises(ReproError, match="the preset's `contents` says"):
        with_contents(now, contents(now, folder / "runs"))


def test_a_finished_run_is_made_again_when_its_data_changed(tmp_path, folder, capsys):
    """From the command line: all of them, since each is scored on the task or starts from a model that was."""
    pair = {"first": "gsm8k", "second": "strings", "learn": recipe(), "adapt": recipe()}
    arm = {"tries": [{"method": {"name": "epi", "ratio": 0.1, "interval": 1}}]}
    preset = {
        "name": "tiny", "seeds": [1], "models": {"m": BASE.model.model_dump(mode="json")},
        "tasks": {
            "gsm8k": {"kind": "gsm8k", "source": str(folder / "data")},
            "strings": {"kind": "strings", "train": 20, "test": 4},
        },
        "sequential": {"pairs": [pair], "full_lrs": [1e-3, 1e-4], "alphas": [0.5], "arms": {"EPI": arm}},
    }  # fmt: skip
    path = tmp_path / "tiny.json.yaml"
    path.write_text(json.dumps(preset))
    line = ["reproduce", "--preset", str(path), "--out", str(tmp_path / "out"), "--device", "cpu"]
    line += ["--workers", "1", "--table", "cpift-2"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert cli.main(line) == 0
        count = len(list(tmp_path.glob("out/runs/*/manifest.json")))
        capsys.readouterr()
        assert cli.main([*line, "--dry-run"]) == 0
        assert "0 of them to be made" in capsys.readouterr().out
        lines(folder / "data" / "train.jsonl", range(30))
        assert cli.main([*line, "--dry-run"]) == 0
        assert f"from {count} runs, {count} of them to be made" in capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)


def recipe() -> dict[str, float]:
    return {"lr": 1e-3, "steps": 1, "batch": 4}
