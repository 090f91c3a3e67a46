"""Preset medium: within its time by the arithmetic that it states, and every table of it made at reduced steps."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from repro_runs import second

from bench import status
from epi_kernels.repro import stages
from epi_kernels.repro.bundle import bundle, write_bundle
from epi_kernels.repro.execute import ensure
from epi_kernels.repro.methods.config import Epi, Full
from epi_kernels.repro.output import render
from epi_kernels.repro.preset import PRESETS, Preset, load_preset
from epi_kernels.repro.runs import ancestry, key
from epi_kernels.repro.store import Store
from epi_kernels.repro.sweep import Plan, sweep
from epi_kernels.repro.tables import TABLES
from epi_kernels.repro.train import Limits
from epi_kernels.repro.workshop import Workshop
from python_tests import reproduce_time
from python_tests.threads import on_threads

LIMIT_S = 1200  # of the 25 minutes that it may take
SMALL = {
    "steps": 2, "batch": 4, "interval": 1, "every": 1, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "seeds": [1],
}  # fmt: skip


@pytest.fixture(scope="module")
def medium() -> Preset:
    return load_preset("medium")


def shrunk(value: Any) -> Any:
    """The same plans with two steps of a model of one layer, one seed and few examples."""
    if isinstance(value, list | tuple):
        return [shrunk(one) for one in value]
    if not isinstance(value, dict):
        return value
    small = {
        name: SMALL[name] if name in SMALL and one is not None else shrunk(one) for name, one in value.items()
    }
    return small | ({"train": 80, "test": 8} if "share" in value and "kind" in value else {})


def test_it_fits_its_time_by_the_arithmetic_that_its_comment_states(medium):
    found = {name: round(value) for name, value in reproduce_time.by_table(medium).items() if value}
    assert found["all"] <= LIMIT_S
    said = (PRESETS / "medium.yaml").read_text()
    stated = {name: int(value) for name, value in re.findall(r"^#   ([\w-]+) +(\d+) s\b", said, re.M)}
    assert stated == found


def test_sizes_splits_and_budgets(medium):
    models = {**medium.models, **medium.vision.models}
    sizes = [reproduce_time.parameters(one.model_dump_json()) for one in models.values()]
    assert all(30e6 <= size <= 100e6 for size in sizes)
    assert [one.sees for one in models.values()] == [False, False, True]
    assert len({len(arm.tries) for arm in medium.sequential.arms.values() if arm.tuned}) == 1
    pair = medium.low_resource.sequential.pairs[0]
    assert [medium.tasks[name].share for name in (pair.first, pair.second)] == [0.1, 0.1]
    assert len(medium.seeds) >= 5 and set(medium.tables) <= TABLES.keys()
    # all text models' runs start from one base each
    bases = {key(one) for name in medium.tables for run in TABLES[name].runs(medium) for one in ancestry(run)
             if one.kind == "base"}  # fmt: skip
    assert len(bases) == len(models)


def test_a_setting_is_not_tuned(medium):
    described = medium.model_dump()
    arm = described["vision"]["sequential"]["arms"]["EPI"]
    arm["tries"] = [*arm["tries"], {**arm["tries"][0], "lr": 1e-3}]
    with pytest.raises(ValueError, match="EPI: an arm of a setting has one try"):
        Preset.model_validate(described)


def test_a_settings_task_that_is_not_there(medium):
    described = medium.model_dump()
    described["vision"]["tasks"] = None
    with pytest.raises(ValueError, match="no such task under tasks: places, shapes"):
        Preset.model_validate(described)


def test_every_table_at_reduced_steps(medium, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "PICTURES", 20)
    monkeypatch.setattr(stages, "TEXTS", 20)
    for made in (stages._text, stages._pictures):
        made.cache_clear()
    preset = Preset.model_validate(shrunk(medium.model_dump()))
    names = [name for name in preset.tables if name != "tuning"]  # a second try of every arm: nothing new
    plan, store = Plan.of(run for name in names for run in TABLES[name].runs(preset)), Store(tmp_path)
    try:
        with on_threads(1):
            assert sweep(plan, store, device=torch.device("cpu"), workers=1).left == 0
    finally:
        for made in (stages._text, stages._pictures):
            made.cache_clear()
    tables = {one.name: one for one in render(preset, plan.manifests(store), names)}
    assert list(tables) == names and all(one.rows for one in tables.values())
    assert {row[1] for row in tables["vision"].rows} >= {"EPI", "static g2", "full SFT, lr 0.0005"}
    assert any("llava-30m" in one for one in tables["vision"].findings)
    assert any("10 % of sums, 10 % of strings" in one for one in tables["low-resource"].notes)
    places = [figure.name for one in tables.values() for figure in one.figures]
    assert len(places) == len(set(places))  # each a file


@pytest.mark.parametrize("method", [Full(), Full(optimizer="epi"), Epi(ratio=0.2, interval=4)], ids=str)
def test_a_step_waits_for_no_figure_of_the_one_before(method, tmp_path, monkeypatch):
    """Nothing of the loop turns a tensor into a number, for which a GPU would be waited; the record of a refresh does."""
    run = second(method)
    bench = Workshop(Store(tmp_path), torch.device("cpu"), keep=frozenset(map(key, ancestry(run))))
    ensure(run.before, bench)
    read, by_step = 0, []

    def counting(original):
        def reading(tensor):
            nonlocal read
            read += 1
            return original(tensor)

        return reading

    for name in ("__float__", "__int__", "item"):
        monkeypatch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
    limits = Limits(tick=lambda: by_step.append(read))
    ensure(run, Workshop(bench.store, bench.device, limits, bench.keep))
    waited = [step for step in range(1, 6) if by_step[step] > by_step[step - 1]]
    assert len(by_step) == 6 and waited == ([3] if isinstance(method, Epi) else [])


def test_the_readmes_line_on_medium(tmp_path, medium):
    never = "**Preset `medium`, one GPU:** never run."
    assert status.medium_line(tmp_path) == never
    run = second()
    bench = Workshop(Store(tmp_path / "runs"), torch.device("cpu"))
    made = ensure(run.before.before, bench)

    def write(preset: Preset, **machine: Any) -> str:
        one = made.model_copy(update={"machine": made.machine | machine})
        write_bundle(bundle(preset, [], {one.key: one}), tmp_path / "reproduce-medium.json")
        return status.medium_line(tmp_path)

    assert write(medium) == never  # on a CPU
    said = write(medium, gpu="A GPU")
    assert "A GPU" in said and "never" not in said and "Stale" not in said
    assert "Stale" in write(medium.with_seeds([1, 2]), gpu="A GPU")
