"""The paper preset from the command line at toy size, with data and checkpoints in the real formats; and what goes wrong."""

from __future__ import annotations

import csv
import errno
import html
import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from judge_endpoint import completion, endpoint
from paper_fixtures import write_all
from paper_preset import ARCHITECTURES, make_checkpoints, paper, toy, written
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from epi_kernels import cli, footprint, memory
from epi_kernels.repro import execute, output, published_values, stages, sweep, workshop
from epi_kernels.repro import train as train_
from epi_kernels.repro.config import TaskSpec
from epi_kernels.repro.contents import contents, with_contents
from epi_kernels.repro.methods.config import Method
from epi_kernels.repro.preset import Preset, load_preset
from epi_kernels.repro.runs import Train, base_of, key, parents
from epi_kernels.repro.store import MANIFEST, Store
from epi_kernels.repro.sweep import Plan
from epi_kernels.repro.tables import TABLES, tables_of
from epi_kernels.repro.tables import paper as rules
from epi_kernels.repro.tasks import judge, make_task
from epi_kernels.repro.tasks.chat import Judged
from epi_kernels.repro.tasks.gsm8k import Gsm8k

LLAMA = "LLaMA-2-7B"
GOOD = completion("Fair.\nRating: [[7]]")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("data"), 32)


@pytest.fixture(scope="module")
def models(tmp_path_factory, data) -> dict[str, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("models"), data, ARCHITECTURES)


@pytest.fixture(scope="module")
def url():
    with endpoint([GOOD]) as (address, _):
        yield address


def reproduce(preset: Path, out: Path, *arguments: object) -> int:
    line = ["reproduce", "--preset", preset, "--out", out, "--device", "cpu", "--workers", 1, *arguments]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return cli.main([str(one) for one in line])
    finally:
        torch.set_num_threads(threads)


def one_arm(models: dict[str, Path], data: dict[str, Path], url: str, **changes: Any) -> dict[str, Any]:
    """One model, one pair, one arm: a base, a first stage, two of full SFT, one of EPI."""
    preset = toy({LLAMA: models[LLAMA]}, data, url, tables=["cpift-2"])
    arms = preset["sequential"]["arms"]
    preset["sequential"]["arms"] = {"EPI": arms["EPI"]}
    preset["sequential"]["pairs"] = preset["sequential"]["pairs"][:1]
    preset["tasks"] = {name: preset["tasks"][name] for name in ("gsm8k", "alpaca")}
    for plan in ("mixture", "imbalance", "drift", "sweep"):
        del preset[plan]
    return preset | changes


def manifests(out: Path) -> dict[str, int]:
    """Of finished runs, when they were written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob(f"runs/*/{MANIFEST}")}


def runs_of(preset: Path, table: str = "cpift-2") -> Plan:
    return Plan.of(TABLES[table].runs(stamped(preset)))


def stamped(path: Path) -> Preset:
    """As the command reads it."""
    preset = load_preset(str(path))
    return with_contents(preset, contents(preset, path.parent / "digests"))


# Of the papers' future work: preset medium has them.
FUTURE = {"low-resource", "vision"}
PAPERS = {name: table for name, table in TABLES.items() if name not in FUTURE}


# ---------------------------------------------------------------- the preset as it is shipped


def test_the_preset_has_every_table_and_every_method_with_as_many_tries():
    preset = load_preset("paper")
    assert tables_of(preset) == list(PAPERS)
    assert preset.sequential is not None
    arms = preset.sequential.arms
    assert {arm.settled.method.name for arm in arms.values()} == {
        one.model_fields["name"].default for one in get_args(get_args(Method)[0])
    }
    assert {len(arm.tries) for arm in arms.values()} == {len(preset.sequential.full_lrs)}
    assert list(published_values.TABLE1) == list(preset.models)[:4]
    assert all(spec.checkpoint and spec.dtype == "bfloat16" for spec in preset.models.values())


def test_the_memory_that_the_preset_states_is_what_the_command_counts():
    lines = Path(str(execute.__file__)).with_name("presets").joinpath("paper.yaml").read_text().splitlines()
    (head,) = (at for at, line in enumerate(lines) if line.split()[1:3] == ["LLaMA-2-7B", "LLaMA-3-8B"])
    stated = [[float(x) for x in line.split()[-5:]] for line in lines[head + 1 : head + 5]]
    for column, model in enumerate(lines[head].split()[1:]):
        sizes = memory.model_sizes(model.replace("LLaMA", "Llama"))
        total = {
            row.name: 4 * sum(sizes) + row.state + row.refresh for row in memory.rows(sizes, torch.bfloat16)
        }
        counted = [
            total["ours, 8-bit states"],
            total["ours"],
            (2 + 2 + 8) * sum(sizes),
            total["EPI as published"],
        ]
        assert [row[column] for row in stated] == [round(one / 1e9, 1) for one in counted], model


# ---------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def finished(tmp_path_factory, models, data, url) -> tuple[Path, Preset]:
    """All that the preset has, a few steps a stage: four architectures, nine data sets, every method, every table."""
    folder = tmp_path_factory.mktemp("paper")
    preset = toy(models, data, url)
    path = written(preset, folder / "toy.yaml")
    assert reproduce(path, folder / "out") == 0
    return folder / "out", stamped(path)


def test_the_tables_are_there_with_figures_and_the_page(finished):
    out, _ = finished
    with (out / "tables" / "tables.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["table"] for row in rows} == set(PAPERS)
    assert {row["table"] for row in rows if row["paper"]} == {"cpift-1", "cpift-2", "epi-main"}
    page = (out / "index.html").read_text()
    for name in PAPERS:
        assert html.escape(TABLES[name].title) in page
    assert (out / "tables" / "tables.tex").is_file() and list((out / "tables" / "figures").glob("*.png"))
    assert 'src="http' not in page and 'href="http' not in page, "the page stands alone"


def test_printed_values_stand_beside_ours_where_the_set_up_is_the_papers(finished):
    out, preset = finished
    found = {
        key(run): Store(out / "runs").manifest(run)
        for run in Plan.of(TABLES["cpift-1"].runs(preset)).runs.values()
    }
    table = TABLES["cpift-1"].render(preset, found)
    for row, (model, method) in zip(
        table.rows, ((m, k) for m in published_values.TABLE1 for k in published_values.METHODS)
    ):
        printed = published_values.TABLE1[model][method]
        assert row[0] == model
        assert [cell.paper for cell in row[2:7]] == [printed.tasks[kind] for kind in published_values.TASKS]
        assert row[7].paper == pytest.approx(printed.recomputed, abs=0.005)
    assert not any("Not comparable" in note for note in table.notes)
    assert any("instruction-tuned" in note for note in table.notes)


def test_table_2_prints_what_is_comparable_and_nothing_else(finished):
    out, preset = finished
    plan = Plan.of(TABLES["cpift-2"].runs(preset))
    table = TABLES["cpift-2"].render(preset, plan.manifests(Store(out / "runs")))
    beside = {(row[0], row[1]): (row[3].paper, row[4].paper) for row in table.rows}
    cores = "static mask, weight changes (CPI-FT's cores)"
    assert beside["gsm8k → alpaca", cores] == (-5.7, 12.2)
    assert beside["alpaca → gsm8k", cores] == (-4.8, 18.8)
    assert beside["gsm8k → alpaca", "EPI"] == (None, None)
    other = preset.model_copy(
        update={"models": {"mine": preset.models[LLAMA]}}
    )  # the same runs by another name
    table = TABLES["cpift-2"].render(other, plan.manifests(Store(out / "runs")))
    assert all(cell.paper is None for row in table.rows for cell in row[3:5])
    assert any("Not comparable" in note and "mine" in note for note in table.notes)


def test_fewer_examples_or_no_judge_is_not_the_papers_set_up(finished):
    _, preset = finished
    for kind, changes in (("gsm8k", {"train": 5}), ("gsm8k", {"test": 2}), ("alpaca", {"judge": None})):
        spec = preset.tasks[kind].model_copy(update=changes)
        assert rules.same_task(preset.tasks[kind]) and not rules.same_task(spec)


def test_states_are_8_bit_and_weights_are_kept_where_others_start_from_them(finished):
    out, preset = finished
    plan = Plan.of(run for table in PAPERS.values() for run in table.runs(preset))
    store = Store(out / "runs")
    found = plan.manifests(store)
    llama = {name for name, run in plan.runs.items() if base_of(run).model == preset.models[LLAMA]}
    tensors = load_file(store.at(plan.runs[min(plan.keep & llama)]) / "model.safetensors").values()
    states = footprint.masked_ema_adamw([one.numel() for one in tensors], torch.bfloat16, state_dtype="int8")
    moments = {one: states[one] for one in ("exp_avg", "exp_avg_sq")}
    for name, run in plan.runs.items():
        kept = list(store.at(run).glob("*.safetensors"))
        assert bool(kept) == (name in plan.keep), "a leaf leaves no weights"
        if name in llama and isinstance(run, Train) and run.method.name in ("full", "epi"):
            assert {one: found[name].bytes.optimizer[one] for one in moments} == moments
    assert not list((out / "runs").glob("*.fused")) and not list((out / "runs").glob("*.progress"))
    base = store.at(TABLES["cpift-2"].runs(preset)[0].before)
    assert {one.dtype for one in load_file(base / "model.safetensors").values()} == {torch.bfloat16}


def test_a_tokenizer_without_a_chat_template_gets_the_fallback(finished, models):
    out, preset = finished
    assert "chat_template" not in (models[LLAMA] / "tokenizer_config.json").read_text()
    first = Store(out / "runs").at(TABLES["cpift-2"].runs(preset)[0])
    saved = "".join(path.read_text() for path in first.iterdir() if path.suffix in (".json", ".jinja"))
    assert "### Assistant" in saved


# ---------------------------------------------------------------- what goes wrong


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
