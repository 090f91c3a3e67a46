"""Every table on a made-up preset: which runs it names, that it renders, and what it says when runs are missing."""

from __future__ import annotations

import pytest

from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.methods.config import Epi, Ewc, Full, L2Sp, RandomMask, Replay, Window
from epi_kernels.repro.preset import Preset, load_preset
from epi_kernels.repro.runs import ancestry, key
from epi_kernels.repro.tables import TABLES, access, plans, results, tables_of
from epi_kernels.repro.tables.base import Cell, Figure
from epi_kernels.repro.writers import csv_text, markdown
from epi_kernels.repro.writers.plots import drawn
from python_tests.repro_fakes import FULL_MARK, fake_task, make_preset, manifests

BESIDE = ("mixture", "imbalance", "sweep", "drift", "low_resource", "vision")  # plans beside `sequential`


@pytest.fixture(autouse=True)
def tasks(monkeypatch):
    monkeypatch.setattr(results, "make_task", fake_task)


@pytest.fixture(scope="module")
def preset() -> Preset:
    return make_preset()


@pytest.fixture(scope="module")
def keys(preset) -> dict[str, set[str]]:
    return {name: {key(run) for run in table.runs(preset)} for name, table in TABLES.items()}


def some_score(run, kind: str) -> float:
    """Between 0 and the full mark; another one for every run and kind."""
    return FULL_MARK.get(kind, 100.0) * (int(key(run)[:4], 16) % 97 + len(kind) % 3) / 100


@pytest.mark.parametrize("name", TABLES)
def test_a_table_renders(name, preset):
    table = TABLES[name]
    found = manifests(table, preset, some_score)
    rendered = table.render(preset, found)
    assert rendered.name == name and rendered.rows and rendered.notes and rendered.findings
    assert len(rendered.runs) == len(rendered.rows)
    assert {one for row in rendered.runs for one in row} <= set(found)
    for row in rendered.rows:
        assert isinstance(row[0], str) and len(row) == len(rendered.columns)
        for cell in row:
            if isinstance(cell, Cell) and name != "tuning":
                assert len(cell.values) == len(preset.seeds)
    labels = [tuple(cell for cell in row if isinstance(cell, str)) for row in rendered.rows]
    assert len(set(labels)) == len(labels), "two rows cannot be told apart"
    assert markdown(rendered) and csv_text([rendered])
    for sentence in rendered.findings:
        assert (
            sentence.endswith(".") and "  " not in sentence and "( " not in sentence and "()" not in sentence
        )
    for figure in rendered.figures:
        assert isinstance(figure, Figure)
        axes = drawn(figure).axes
        assert any(one.lines or one.collections for one in axes)


@pytest.mark.parametrize("name", TABLES)
def test_a_run_that_is_missing_is_named(name, preset):
    table = TABLES[name]
    found = manifests(table, preset, some_score)
    last = next(run for run in table.runs(preset) if getattr(run, "seed", None) in (3, 0))
    del found[key(last)]
    with pytest.raises(ReproError, match=f"--table {name}: 1 runs have no manifest yet.*{key(last)}"):
        table.render(preset, found)


@pytest.mark.parametrize("name", TABLES)
def test_a_preset_without_the_plan_is_refused(name):
    empty = make_preset(sequential=None, **dict.fromkeys(BESIDE))
    with pytest.raises(access.NoPlan, match=f"--table {name}: preset made-up has no "):
        TABLES[name].runs(empty)
    assert tables_of(empty) == []


def test_tables_of_a_preset_are_those_it_has_plans_for(preset):
    assert tables_of(preset) == list(TABLES)
    some = tables_of(make_preset(**dict.fromkeys(BESIDE)))
    assert some == [
        "frontier", "cpift-2", "epi-forgetting", "epi-static-dynamic", "stability", "memory", "beyond", "tuning"
    ]  # fmt: skip


def test_tables_share_their_runs(preset, keys):
    assert keys["cpift-2"] == keys["epi-forgetting"] == keys["epi-static-dynamic"] < keys["frontier"]
    assert keys["frontier"] == keys["beyond"]
    assert keys["cpift-1"] < keys["epi-main"]
    shown = [run for name in ("frontier", "epi-main") for run in TABLES[name].runs(preset)]
    assert keys["memory"] < {
        key(one) for run in shown for one in ancestry(run)
    }  # stages before them count, too
    assert keys["cpift-3"] & keys["cpift-1"]
    for sensitivity in ("cpift-tau", "cpift-p"):  # the plan's own value, on two models and three seeds
        assert len(keys[sensitivity] & keys["cpift-1"]) == 6
    for sweep in ("epi-ratio", "epi-interval", "epi-beta", "epi-normalization"):
        unshared = keys[sweep] - keys["frontier"]
        assert (
            len(keys[sweep]) - len(unshared) == 3 * 4
        )  # first stage, two rates of full SFT, the arm as it is
    for other in ("epi-schedule", "epi-accumulation"):
        assert len(keys[other] & keys["frontier"]) == 3 * 3


def test_all_the_data_is_one_run_whichever_task_is_cut(preset):
    table = TABLES["cpift-4"]
    for method in ("full SFT", "CPI-FT", "EPI"):
        whole = {key(table.run(preset, method, task, 1.0, 1)) for task in preset.imbalance.tasks}
        tenth = {key(table.run(preset, method, task, 0.1, 1)) for task in preset.imbalance.tasks}
        assert len(whole) == 1 and len(tenth) == 3


def test_all_runs_of_a_model_start_from_one_base(preset):
    runs = [run for table in TABLES.values() for run in table.runs(preset)]
    bases = {key(one) for run in runs for one in ancestry(run) if one.kind == "base"}
    seeing = plans.base(preset.under(preset.vision))
    assert bases == {key(seeing), *(key(plans.base(preset, model)) for model in preset.models)}


def test_stages_divide_the_budget_to_the_last_step(preset):
    for seed in preset.seeds:
        stages = plans.random_stages(preset, seed)
        assert [len(stage) for stage in stages] == [2, 1]
        assert {spec.kind for stage in stages for spec in stage} == {"sums", "strings", "topics"}
        last = plans.stages_run(preset, stages, seed)
        assert [last.before.recipe.steps, last.recipe.steps] == [21, 20]  # of 41
    drawn_by_seed = {tuple(map(plans.kinds, plans.random_stages(preset, seed))) for seed in range(20)}
    assert len(drawn_by_seed) > 2


def test_a_method_that_rests_on_a_stage_gets_one_out_of_its_budget(preset):
    static = plans.mixture(preset, preset.mixture.arms["static"].settled, 1)
    assert (static.before.recipe.steps, static.recipe.steps) == (10, 31)
    assert static.before.method.optimizer == "epi" and static.before.before.kind == "base"
    epi = plans.mixture(preset, preset.mixture.arms["EPI"].settled, 1)
    assert epi.before.kind == "base" and epi.recipe.steps == 41


@pytest.mark.parametrize(
    ("method", "rests"),
    [
        (Full(), False),
        (Full(optimizer="epi", keep_moments=True), True),
        (Epi(), True),
        (Epi(carry=False), False),
        (Epi(carry=False, core=0.01), True),
        (RandomMask(carry=False), False),
        (Window(), True),
        (Ewc(), True),
        (L2Sp(), False),
        (Replay(), False),
    ],
    ids=str,
)
def test_what_rests_on_a_stage(method, rests):
    assert plans.rests_on_a_stage(method) is rests


def test_tau_zero_and_the_readings_reach_the_run(preset):
    run = plans.mixture_cpift(preset, 1, tau=0.0, reading="all", single_stage=True)
    assert (run.tau, run.reading, run.single_stage, run.core_ratio) == (0.0, "all", True, 0.01)
    assert [probe.tasks[0].kind for probe in run.probes] == [task.kind for task in run.tasks]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heuristic": [["sums"], ["strings"]]}, "heuristic must put each"),
        ({"random_stages": 4}, "random_stages is 4, there are 3 tasks"),
        ({"recipe": {"lr": 1e-3, "steps": 5, "batch": 8}}, "must be longer than its probe"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(changes, message):
    mixture = make_preset().mixture.model_dump() | changes
    with pytest.raises(ReproError, match=message):
        TABLES["epi-main"].runs(make_preset(mixture=mixture))


def test_two_tasks_of_one_kind_in_a_plan_are_refused():
    twice = {name: {"kind": "sums"} for name in ("sums", "strings", "topics", "spans")}
    with pytest.raises(ReproError, match="two tasks of one plan are of the kind sums"):
        TABLES["frontier"].runs(make_preset(tasks=twice))


def test_a_score_that_a_manifest_lacks_is_named(preset):
    table = TABLES["cpift-2"]
    found = manifests(table, preset, some_score)
    one = key(next(iter(table.runs(preset))))
    found[one] = found[one].model_copy(update={"scores": {}})
    with pytest.raises(ReproError, match=f"run {one}: its manifest has no score on "):
        table.render(preset, found)


def test_an_arm_with_hysteresis_is_swept_without_z_scores():
    preset = load_preset("small").model_dump()
    for one in preset["sequential"]["arms"]["EPI"]["tries"]:
        one["method"]["hysteresis"] = 0.1
    methods = {
        run.method
        for run in TABLES["epi-normalization"].runs(Preset.model_validate(preset))
        if run.kind == "train"
    }
    assert {"minmax", "none"} == {one.normalization for one in methods if one.name == "epi"}
