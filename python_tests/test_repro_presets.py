"""The presets that come with the package: they load, ask for tables that exist, and give every arm the same budget."""

from __future__ import annotations

import pytest
import yaml

from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.preset import PRESETS, load_preset
from epi_kernels.repro.sweep import Plan
from epi_kernels.repro.tables import TABLES, tables_of

NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))


def test_they_are_there():
    assert {"small", "beyond", "beyond-search"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_plans_every_table_it_names(name):
    preset = load_preset(name)
    assert preset.name == name
    assert set(preset.tables) <= set(tables_of(preset))
    plan = Plan.of(run for table in preset.tables or tables_of(preset) for run in TABLES[table].runs(preset))
    assert set(plan.keep) <= set(plan.runs)


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_of_a_plan_has_the_same_number_of_tries(name):
    preset = load_preset(name)
    for plan in (preset.sequential, preset.mixture, preset.imbalance):
        assert len({len(arm.tries) for arm in plan.arms.values()} if plan else ()) <= 1


@pytest.mark.parametrize("name", [name for name in NAMES if name in ("small", "medium", "beyond")])
def test_headline_rows_have_five_seeds_that_nothing_was_chosen_on(name):
    preset = load_preset(name)
    assert len(preset.seeds) >= 5
    assert not {0, 1, 100} & set(preset.seeds)  # task sizes, pairs and settings were chosen on these


def test_the_final_test_of_the_search_has_a_pair_and_seeds_of_its_own():
    search, final = load_preset("beyond-search"), load_preset("beyond")
    assert search.sequential is not None and final.sequential is not None
    pairs = [{(pair.first, pair.second) for pair in one.sequential.pairs} for one in (search, final)]
    assert not pairs[0] & pairs[1] and not set(search.seeds) & set(final.seeds)
    tried = {name: arm.tries for name, arm in search.sequential.arms.items()}
    assert tried == {name: arm.tries for name, arm in final.sequential.arms.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 3}, "speed: Extra inputs"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [0]}, "tuning seed 0"),
        ({"drift": {"tasks": ["songs"], "recipe": {"lr": 1e-3, "steps": 1}}}, "songs"),
    ],
)
def test_a_preset_that_is_wrong_is_refused_by_the_place(tmp_path, change, message):
    record = yaml.safe_load((PRESETS / "small.yaml").read_text())
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(record | change))
    with pytest.raises(ReproError, match=message):
        load_preset(str(path))


@pytest.mark.parametrize("name", ["nothing", "nothing.yaml"])
def test_a_preset_that_is_not_there(name):
    with pytest.raises(ReproError, match="small"):
        load_preset(name)
