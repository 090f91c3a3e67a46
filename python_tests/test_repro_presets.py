"""The presets that come with the package: they load, ask for tables that exist, and give every arm the same budget."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml

from epi_kernels.repro import command
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.methods.config import Epi, Inverted, RandomMask
from epi_kernels.repro.preset import PRESETS, Preset, load_preset
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
        assert len({len(arm.tries) for arm in plan.arms.values() if arm.tuned} if plan else ()) <= 1


@pytest.mark.parametrize("name", [name for name in NAMES if name != "beyond-search"])
def test_headline_rows_have_five_seeds_that_nothing_was_chosen_on(name):
    preset = load_preset(name)
    assert len(preset.seeds) >= 5
    if name != "paper":  # on real tasks nothing was chosen
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
        ({"seeds": [0]}, "0 is the tuning seed"),
        ({"seeds": [11, 12, 11]}, "the seed 11 stands there twice"),
        ({"seeds": [2**32]}, "not from 0 to 2"),
        ({"tasks": {"sums": {"kind": "sumz"}}}, "tasks.sums: no kind of task is called 'sumz'"),
        ({"pretrain": {"lr": float("inf"), "steps": 1}}, "pretrain.lr: Input should be a finite number"),
        ({"pretrain": {"lr": 1e-3, "steps": 1, "betas": [0.9, 1.0]}}, "betas.1: Input should be less than 1"),
        ({"drift": {"tasks": [], "recipe": {"lr": 1e-3, "steps": 1}}}, "drift.tasks"),
        (
            {"drift": {"tasks": ["sums", "sums"], "recipe": {"lr": 1e-3, "steps": 1}}},
            "drift.tasks: sums stands",
        ),
        ({"sweep": {"of": "EWC", "ratios": [0.1]}}, "'EWC' is not an arm of EPI"),
        ({"sweep": {"of": "EPI", "schedules": ["cosin"]}}, "sweep.schedules.0: Input should be 'cosine'"),
        ({"sweep": {"of": "EPI", "betas": [1.5]}}, "sweep.betas.0"),
        ({"sweep": {"of": "EPI", "clips": [-1.0]}}, "sweep.clips.0"),
        ({"sweep": {"of": "EPI", "accumulations": [3]}}, "a batch of 40 has no 3 equal parts"),
        ({"drift": {"tasks": ["songs"], "recipe": {"lr": 1e-3, "steps": 1}}}, "songs"),
        ({"tables": ["memory", "drift", "memory"]}, "tables: Value error, memory stands there twice"),
        (
            {"sweep": {"of": "EPI", "ratios": [0.1, 0.2, 0.1]}},
            "sweep.ratios: Value error, 0.1 stands there twice",
        ),
        (
            {"sweep": {"of": "EPI", "clips": [None, 1.0, None]}},
            "sweep.clips: Value error, null stands there twice",
        ),
        ({"sweep": {"of": "EPI", "intervals": [5, 5]}}, "sweep.intervals: Value error, 5 stands there twice"),
        (
            {"drift": {"tasks": ["sums"], "recipe": {"lr": 1e-3, "steps": 1}, "ratios": [0.1, 0.1]}},
            "drift.ratios: Value error, 0.1 stands there twice",
        ),
    ],
)
def test_a_preset_that_is_wrong_is_refused_by_the_place(tmp_path, change, message):
    record = yaml.safe_load((PRESETS / "small.yaml").read_text())
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(record | change))
    with pytest.raises(ReproError, match=message):
        load_preset(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"full_lrs": [0.0, 1e-3]}, "full_lrs.0: Input should be greater than 0"),
        ({"full_lrs": [1e-3, 5e-4, 0.001]}, "sequential.full_lrs: Value error, 0.001 stands there twice"),
        ({"alphas": [0.5, 0.5]}, "sequential.alphas: Value error, 0.5 stands there twice"),
        ({"pairs": [0, 0]}, "sequential.pairs: deductions then strings stands there twice"),
        ({"pairs": [{"second": "deductions"}]}, "deductions is both the first and the second task"),
    ],
)
def test_a_sequence_that_makes_no_sense_is_refused(tmp_path, change, message):
    record = yaml.safe_load((PRESETS / "small.yaml").read_text())
    plan = record["sequential"]
    for key, value in change.items():
        plan[key] = [
            plan[key][one] if type(one) is int else plan[key][0] | one if isinstance(one, dict) else one
            for one in value
        ]
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(record))
    with pytest.raises(ReproError, match=message):
        load_preset(str(path))


TRY = {"method": {"name": "ewc"}, "lr": 1e-3}


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"tries": [TRY, TRY]}, "tries: Value error, .* stands there twice"),
        ({"tries": []}, "either tries or another arm"),
        ({"tries": [TRY], "like": "EPI", "but": {"ratio": 0.1}}, "either tries or another arm"),
        ({"tries": [TRY], "but": {"ratio": 0.1}}, "but: without an arm that it is like"),
        ({"like": "EPI"}, "like EPI in everything"),
        ({"like": "EPY", "but": {"ratio": 0.1}}, "new: like 'EPY', which is no arm"),
        ({"like": "EPI, p = 1 %", "but": {"ratio": 0.1}}, "which is no arm with tries of its own"),
        ({"like": "EPI", "but": {"ratios": 0.1}}, "new: but: epi.ratios: Extra inputs"),
        ({"like": "EPI", "but": {"name": "randum"}}, "new: but: .*'randum'"),
    ],
)
def test_an_arm_that_makes_no_sense_is_refused(tmp_path, arm, message):
    record = yaml.safe_load((PRESETS / "small.yaml").read_text())
    record["sequential"]["arms"]["new"] = arm
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(record))
    with pytest.raises(ReproError, match=message) as error:
        load_preset(str(path))
    assert "\n" not in str(error.value)


def test_an_arm_like_another_has_its_chosen_ratio_and_rate_whichever_they_are(tmp_path):
    record = yaml.safe_load((PRESETS / "small.yaml").read_text())
    path = tmp_path / "other.yaml"
    for chosen in range(len(record["sequential"]["arms"]["EPI"]["tries"])):
        record["sequential"]["arms"]["EPI"]["chosen"] = chosen
        path.write_text(yaml.safe_dump(record))
        arms = load_preset(str(path)).sequential.arms
        epi = arms["EPI"].settled
        for name, kind in (("random mask", "random"), ("inverted mask", "inverted")):
            control = arms[f"{name} at EPI's ratio"].settled
            assert (control.method.name, control.method.ratio, control.lr) == (kind, epi.method.ratio, epi.lr)
            assert control.method.interval == epi.method.interval
        assert arms["EPI, p = 1 %"].settled == epi.model_copy(
            update={"method": epi.method.model_copy(update={"ratio": 0.01})}
        )


def test_arms_like_another_are_written_as_stated_and_go_with_it():
    preset = load_preset("medium")
    written = preset.model_dump(mode="json")
    assert written["sequential"]["arms"]["EPI, p = 1 %"] == {"like": "EPI", "but": {"ratio": 0.01}}
    assert Preset.model_validate(written) == preset
    assert not [name for name, arm in preset.without(["EPI"]).sequential.arms.items() if arm.like == "EPI"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"name: one\nseeds: [1]\nseeds: [2]\n", "'seeds' stands there twice"),
        (b"name: caf\xe9\n", "is not YAML"),
        (b"- 1\n", "preset: Input should be a valid dictionary"),
    ],
)
def test_a_file_that_is_no_preset_is_refused_in_a_line(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_bytes(text)
    with pytest.raises(ReproError, match=message) as error:
        load_preset(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "11", "11"], "--seeds: the seed 11 stands there twice"),
        (["--seeds", "-1"], "--seeds: the seed -1 is not from 0"),
        (["--seeds", "0", "11"], "--seeds: 0 is the tuning seed"),
        (["--time-limit", "nan"], "--time-limit nan: must be above 0"),
        (["--out", __file__], f"--out {__file__}: is a file"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ReproError, match=message):
        chosen("--preset", "small", *arguments)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        ("tasks", {"sums": {"kind": "sums", "harness": "lm-eval"}}, "task sums: lm-eval evaluates gsm8k"),
        ("tasks", {"sums": {"kind": "sums", "source": "/data"}}, "leave out source"),
        (
            "tasks",
            {"sums": {"kind": "gsm8k", "judge": {"url": "http://u/v1", "model": "m"}}},
            "gsm8k: is not judged",
        ),
        (
            "arms",
            {"x": {"tries": [{"method": {"name": "epi", "normalization": "zscore", "hysteresis": 0.1}}]}},
            "arms.x.tries.0.method.epi: .*hysteresis must be 0 with normalization zscore",
        ),
        ("arms", {"CPI-FT": {"tries": [{"method": {"name": "epi"}}]}}, "CPI-FT: a row of the tables has"),
        ("arms", {"full SFT, lr 0.001": {"tries": [{"method": {"name": "ewc"}}]}}, "lr 0.001: a row of"),
    ],
)
def test_what_would_fail_or_mislead_later_is_refused_before_anything_is_made(
    tmp_path, place, change, message
):
    record = yaml.safe_load((PRESETS / "small.yaml").read_text())
    (record if place == "tasks" else record["sequential"])[place].update(change)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(record))
    with pytest.raises(ReproError, match=message):
        chosen("--preset", str(path))


def test_a_run_too_short_for_a_refresh_has_no_stability(tmp_path):
    preset = load_preset("small")
    (pair, *_), arms = preset.sequential.pairs, preset.sequential.arms
    short = pair.model_copy(update={"adapt": pair.adapt.model_copy(update={"steps": 25})})
    brief = preset.model_copy(update={"sequential": preset.sequential.model_copy(update={"pairs": (short,)})})
    assert arms["EPI"].settled.method.interval == 25
    assert "stability" in tables_of(preset) and "stability" not in tables_of(brief)
    with pytest.raises(ReproError, match="EPI refreshes every 25 steps, the second stage has 25"):
        TABLES["stability"].runs(brief)


def test_an_arm_is_left_out_wherever_it_is():
    preset = load_preset("medium").without(["EPI", "static g2"])
    for setting in (preset, preset.low_resource, preset.vision):
        assert not {"EPI", "static g2"} & set(setting.sequential.arms)
    assert preset.sequential.arms and not preset.vision.sequential.arms
    assert TABLES["vision"].runs(preset)


def test_a_table_named_twice_is_made_once():
    assert chosen("--preset", "small", "--table", "memory", "drift", "memory")[1] == ["memory", "drift"]


def test_a_preset_without_a_plan_makes_nothing(tmp_path):
    record = yaml.safe_load((PRESETS / "small.yaml").read_text())
    for plan in ("tables", "sequential", "mixture", "drift", "sweep"):
        del record[plan]
    path = tmp_path / "empty.yaml"
    path.write_text(yaml.safe_dump(record))
    with pytest.raises(ReproError, match="has no plan, so there is no table to make"):
        chosen("--preset", str(path))


def arguments_of(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def chosen(*arguments: str):
    return command._chosen(arguments_of(*arguments))


def test_every_preset_has_a_folder_of_its_own():
    places = [
        command._out(arguments_of(*given))
        for given in ([], ["--preset", "medium"], ["--preset", "my/own.yaml"])
    ]
    assert places == [Path("reproduce_out") / name for name in ("small", "medium", "own")]
    assert command._out(arguments_of("--preset", "medium", "--out", "here")) == Path("here")


@pytest.mark.parametrize("name", ["nothing", "nothing.yaml"])
def test_a_preset_that_is_not_there(name):
    with pytest.raises(ReproError, match="small"):
        load_preset(name)


def test_two_cores_can_make_every_table_of_one_model_that_no_picture_or_scarce_data_need():
    made = {name for preset in ("small", "small-imbalance") for name in tables_of(load_preset(preset))}
    assert set(TABLES) - made == {"low-resource", "vision"}


def test_both_directions_have_the_papers_ratio_and_controls_at_epis():
    for preset in (load_preset("small"), load_preset("medium")):
        methods = [arm.settled.method for arm in preset.sequential.arms.values()]
        epi = preset.sequential.arms["EPI"].settled.method
        assert any(isinstance(one, Epi) and one.ratio == 0.01 for one in methods)
        controls = {type(one) for one in methods if getattr(one, "ratio", None) == epi.ratio}
        assert RandomMask in controls and (Inverted in controls or preset.name == "medium")
