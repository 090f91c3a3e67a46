"""The paper preset as it is shipped; and from the command line at toy size, with data and checkpoints in the real formats."""

from __future__ import annotations

import csv
import html
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from epi_kernels import footprint, memory
from epi_kernels.repro import execute, published_values
from epi_kernels.repro.methods.config import Method
from epi_kernels.repro.preset import Preset, load_preset
from epi_kernels.repro.runs import Train, base_of, key
from epi_kernels.repro.store import Store
from epi_kernels.repro.sweep import Plan
from epi_kernels.repro.tables import TABLES, costs, tables_of
from epi_kernels.repro.tables import paper as rules
from python_tests.judge_endpoint import endpoint
from python_tests.paper_fixtures import write_all
from python_tests.paper_preset import ARCHITECTURES, make_checkpoints, toy, written
from python_tests.paper_runs import GOOD, LLAMA, reproduce, stamped


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
    assert {row["table"] for row in rows} == {*PAPERS, costs.NAME}
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
    note = f"No chat template of its own, so a plain one (### User: ... ### Assistant: ...): {', '.join(models)}."
    assert note in (out / "tables" / "tables.md").read_text(), (
        "which models were asked in a form that is not theirs"
    )
