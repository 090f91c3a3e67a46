"""How long runs are, of real data too: what the progress bar counts up to, and what a dry run says."""

from __future__ import annotations

import math

import pytest

from epi_kernels import cli
from epi_kernels.finetune.ranks import Ranks
from epi_kernels.repro import command
from epi_kernels.repro.config import ModelSpec, Recipe, TaskSpec
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.lengths import steps_of
from epi_kernels.repro.runs import Base, CpiFt, Train
from epi_kernels.repro.sweep import Plan
from epi_kernels.repro.tasks import make_task
from python_tests.paper_fixtures import write_all

EPOCHS = Recipe(lr=1e-3, epochs=3, batch=4)
BASE = Base(model=ModelSpec(config={"model_type": "llama"}), recipe=Recipe(lr=1e-3, steps=9))


def trained(*tasks: TaskSpec, recipe: Recipe = EPOCHS) -> Train:
    return Train(before=BASE, tasks=tasks, evaluate=(), recipe=recipe)


def test_epochs_are_counted_in_the_examples_that_there_are(tmp_path):
    folders = write_all(tmp_path, 32)
    gsm8k, logiqa = (TaskSpec(kind=kind, source=str(folders[kind])) for kind in ("gsm8k", "logiqa"))
    n, m = (len(make_task(one).examples("train")) for one in (gsm8k, logiqa))
    assert n > 8 and m > 8
    half = logiqa.model_copy(update={"share": 0.5})
    run = trained(gsm8k, half)
    assert steps_of(run) == math.ceil(3 * (n + m / 2) / 4)
    assert steps_of(trained(gsm8k.model_copy(update={"train": 8}))) == 6
    assert steps_of(trained(TaskSpec(kind="sums", train=40))) == 30
    whole = CpiFt(
        before=BASE, probes=(run, run), tasks=(gsm8k, logiqa), evaluate=(), stage=EPOCHS,
        consolidation=Recipe(lr=1e-3, steps=7),
    )  # fmt: skip
    assert steps_of(whole) == math.ceil(3 * (n + m) / 4) + 7
    plan = Plan.of([run])
    assert command._bar(plan, list(plan.runs), Ranks()).total == 9 + steps_of(run)


def test_data_that_cannot_be_read_are_named_before_anything_is_made(tmp_path):
    with pytest.raises(ReproError, match="holds no train.jsonl"):
        steps_of(trained(TaskSpec(kind="gsm8k", source=str(tmp_path))))


def test_a_dry_run_names_every_run_and_reads_no_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("epi_kernels.repro.tasks.real.hub_records", None)
    line = [
        "reproduce",
        "--preset",
        "paper",
        "--table",
        "cpift-1",
        "--seeds",
        "1",
        "--dry-run",
        "--out",
        str(tmp_path),
    ]
    assert cli.main(line) == 0
    said = capsys.readouterr().out
    assert "base: Qwen/Qwen1.5-7B" in said
    assert "seed 1  full on gsm8k + codealpaca + logiqa + alpaca + ultrachat, lr 1e-05, 3 epochs" in said
    assert "seed 1  CPI-FT on gsm8k" in said
