"""Revisions of what comes from the hub: passed on, in the run's key, and the commit in the manifest."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from repro_runs import BASE, RECIPE

from epi_kernels import cli
from epi_kernels.repro import hub, models
from epi_kernels.repro.config import ModelSpec, TaskSpec
from epi_kernels.repro.contents import contents
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.execute import ensure
from epi_kernels.repro.hub import CHECKPOINT_FILES, COMMITS, TOKENIZER_FILES
from epi_kernels.repro.models import tokenizer_of
from epi_kernels.repro.pins import commits, unpinned
from epi_kernels.repro.preset import Preset
from epi_kernels.repro.runs import Base, Train, key
from epi_kernels.repro.tasks import make_task
from python_tests.run_shop import shop
from python_tests.tiny_model import save_tiny

MAIN, OTHER = "0" * 39 + "1", "f" * 40  # commits


@pytest.fixture(autouse=True)
def nothing_taken_yet():
    saved = dict(COMMITS)
    COMMITS.clear()
    models._tokenizer.cache_clear()
    yield
    COMMITS.clear()
    COMMITS.update(saved)
    models._tokenizer.cache_clear()


@pytest.fixture
def asked(tmp_path, monkeypatch) -> list[tuple]:
    """What a stand-in for the hub was asked for: checkpoints, and GSM8K's rows."""
    found: list[tuple] = []

    def snapshot_download(name, revision, allow_patterns, ignore_patterns):
        found.append((name, revision, tuple(allow_patterns)))
        commit = revision if revision in (MAIN, OTHER) else MAIN
        folder = tmp_path / "hub" / name / "snapshots" / commit
        if not folder.exists():
            save_tiny(folder)
        return str(folder)

    def load_dataset(name, config, split, revision):
        found.append((name, revision, split))
        rows = [{"question": f"{split} {n}?", "answer": f"#### {n}"} for n in range(8)]
        commit = revision or OTHER
        return Rows(rows, {f"hf://datasets/{name}@{commit}/main/{split}.parquet": {"num_bytes": 1}})

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return found


class Rows(list):
    """As much of a datasets.Dataset as is read."""

    def __init__(self, rows, download_checksums):
        super().__init__(rows)
        self.download_checksums = download_checksums


def test_a_revision_is_in_the_key_and_none_leaves_it_as_it_was():
    plain, pinned = (TaskSpec(kind="gsm8k", **more) for more in ({}, {"revision": MAIN}))
    named = ModelSpec(checkpoint="someone/model", tokenizer="someone/words")
    others = [
        named.model_copy(update=change) for change in ({"revision": MAIN}, {"tokenizer_revision": MAIN})
    ]
    keys = {
        key(Train(before=Base(model=model), tasks=(task,), evaluate=(task,), recipe=RECIPE))
        for model in (named, *others)
        for task in (plain, pinned)
    }
    assert len(keys) == 6
    assert not {"revision", "tokenizer_revision"} & {*plain.model_dump(), *named.model_dump()}


def test_models_and_tokenizers_of_a_revision(asked):
    spec = ModelSpec(checkpoint="someone/model", revision=OTHER)
    tokenizer_of(spec)
    assert asked == [("someone/model", OTHER, TOKENIZER_FILES)]
    apart = ModelSpec(checkpoint="someone/model", revision=OTHER, tokenizer="someone/words")
    tokenizer_of(apart)
    tokenizer_of(apart.model_copy(update={"tokenizer_revision": MAIN}))
    assert [one[:2] for one in asked[1:]] == [("someone/words", None), ("someone/words", MAIN)]
    assert commits([apart]) == {f"someone/model@{OTHER}": OTHER, "someone/words": MAIN}


@pytest.mark.parametrize("source", [None, "someone/gsm8k"])
def test_data_of_a_revision(asked, source):
    spec = TaskSpec(kind="gsm8k", source=source, revision=MAIN)
    make_task(spec).examples("train")
    name = source or "openai/gsm8k"
    assert asked == [(name, MAIN, "train"), (name, MAIN, "test")]
    assert commits([spec]) == {f"{name}@{MAIN}": MAIN}
    theirs = make_task(TaskSpec(kind="logiqa"))
    assert theirs.on_hub(TaskSpec(kind="logiqa")).revision == "refs/convert/parquet"
    assert theirs.on_hub(TaskSpec(kind="logiqa", revision=MAIN)).revision == MAIN
    assert theirs.on_hub(TaskSpec(kind="logiqa", source="someone/logiqa")).revision is None


def test_the_manifest_says_which_commits_they_were(tmp_path, asked):
    """Of names without a revision: weights and tokenizer of one commit, and the data."""
    task = TaskSpec(kind="gsm8k", test=2)
    base = Base(model=ModelSpec(checkpoint="someone/model"))
    run = Train(before=base, tasks=(task,), evaluate=(), recipe=RECIPE.model_copy(update={"steps": 1}))
    bench = shop(tmp_path / "runs", [base])
    assert ensure(base, bench).hub == {"someone/model": MAIN}
    assert [one for one in asked if one[0] == "someone/model"] == [
        ("someone/model", None, TOKENIZER_FILES), ("someone/model", MAIN, CHECKPOINT_FILES)
    ]  # fmt: skip
    assert ensure(run, bench).hub == {"someone/model": MAIN, "openai/gsm8k": OTHER}


def test_what_may_change_is_said(tmp_path, capsys):
    assert unpinned([TaskSpec(kind="sums"), BASE.model, ModelSpec(checkpoint=str(tmp_path))]) == []
    assert unpinned([TaskSpec(kind="gsm8k", revision=MAIN), TaskSpec(kind="nli", revision="main")]) == [
        "stanfordnlp/snli@main"
    ]
    assert unpinned([TaskSpec(kind="gsm8k", revision=MAIN, harness="lm-eval")]) == ["lm-eval's gsm8k"]
    assert cli.main(["reproduce", "--preset", "paper", "--list"]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("may change on the hub under the same name: meta-llama/Llama-2-7b-hf, ")
    assert "openai/gsm8k" in told
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["reproduce", "--preset", "paper", "--table", "epi-main", "--dry-run", *out]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == told
    assert cli.main(["reproduce", "--list"]) == 0
    assert "may change" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        ({"checkpoint": "{folder}", "revision": MAIN}, {"kind": "sums"}, "is a folder"),
        ({"checkpoint": "a/b", "tokenizer": "{folder}", "tokenizer_revision": MAIN}, {"kind": "sums"}, "is a folder"),
        ({"checkpoint": "a/b"}, {"kind": "gsm8k", "source": "{folder}", "revision": MAIN}, "is a folder"),
        ({"checkpoint": "a/b"}, {"kind": "sums", "revision": MAIN}, "has no data on the hub"),
    ],
)  # fmt: skip
def test_a_revision_of_what_has_none(tmp_path, model, task, message):
    model, task = json.loads(json.dumps([model, task]).replace("{folder}", str(tmp_path)))
    preset = Preset(name="p", seeds=(1,), models={"m": ModelSpec(**model)}, tasks={"t": TaskSpec(**task)})
    with pytest.raises(ReproError, match=f"{message}; leave out"):
        contents(preset, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_model_that_lacks_what_its_revision_is_of():
    config = BASE.model.config
    with pytest.raises(ValueError, match="revision is of a checkpoint"):
        ModelSpec(config=config, revision=MAIN)
    with pytest.raises(ValueError, match="tokenizer_revision is of a tokenizer"):
        ModelSpec(checkpoint="a/b", tokenizer_revision=MAIN)


def test_a_commit_that_is_not_there_is_named(monkeypatch):
    def snapshot_download(*_, **__):
        raise ConnectionError("404")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ReproError, match=f"a/b at revision {MAIN}: no such folder, and the hub gave none"):
        hub.fetched("a/b", MAIN, CHECKPOINT_FILES)
