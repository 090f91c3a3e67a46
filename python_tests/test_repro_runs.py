"""The harness around a run: keys, batches, one run resumed to the bit, a sweep that repeats nothing."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import replace
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from repro_runs import BASE, MODEL, RECIPE, STRINGS, SUMS, cpift, first, halfway, second
from safetensors.torch import load_file

from epi_kernels.finetune.chat import Encoded
from epi_kernels.isolation.core_file import CoreFile, union_mask
from epi_kernels.repro import cpift as cpift_
from epi_kernels.repro.config import Recipe
from epi_kernels.repro.data import REPLAYED, Batches
from epi_kernels.repro.describe import describe
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.execute import ensure, execute
from epi_kernels.repro.methods.config import Epi, Full, Replay, Static
from epi_kernels.repro.models import tokenizer_of
from epi_kernels.repro.runs import Train, ancestry, base_of, key, parents
from epi_kernels.repro.stages import _replayed, _sampled
from epi_kernels.repro.store import ISOLATION, MANIFEST, Store
from epi_kernels.repro.sweep import Plan, sweep
from epi_kernels.repro.train import Limits, Stopped, lr_factor
from epi_kernels.repro.weights import core_of
from epi_kernels.repro.workshop import Workshop, encoded

CPU = torch.device("cpu")


def shop(folder, keep=(), limits=None) -> Workshop:
    return Workshop(Store(folder), CPU, limits or Limits(), frozenset(map(key, keep)))


def weights(folder, run):
    return load_file(folder / key(run) / "model.safetensors")


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---------------------------------------------------------------- descriptions


def test_a_key_stands_for_the_whole_description():
    run = second()
    assert key(run) == key(Train.model_validate_json(run.model_dump_json()))
    changed = [
        run.model_copy(update={"seed": 2}),
        run.model_copy(update={"recipe": RECIPE.model_copy(update={"lr": 2e-2})}),
        run.model_copy(update={"method": Epi(ratio=0.2, interval=3)}),
        run.model_copy(update={"before": first(seed=2)}),
    ]
    assert len({key(run), *map(key, changed)}) == 5


def test_a_field_that_came_later_leaves_earlier_keys_alone():
    assert "state_dtype" not in second().recipe.model_dump()
    low = RECIPE.model_copy(update={"state_dtype": "int8"})
    run = second(recipe=low)
    assert run.recipe.model_dump()["state_dtype"] == "int8" and key(run) != key(second())
    assert key(Train.model_validate_json(run.model_dump_json())) == key(run)


def test_an_unknown_key_is_an_error_anywhere():
    record = json.loads(second().model_dump_json())
    record["before"]["tasks"][0]["shear"] = 0.5
    with pytest.raises(ValidationError, match="shear"):
        Train.model_validate(record)


@pytest.mark.parametrize(
    "wrong", [{"steps": 3, "epochs": 1}, {}, {"steps": 3, "batch": 8, "accumulation": 3}]
)
def test_a_recipe_that_makes_no_sense(wrong):
    with pytest.raises(ValidationError):
        Recipe(lr=1e-3, **wrong)


def test_parents_come_before_children():
    run = halfway(second())
    order = [key(one) for one in ancestry(run)]
    assert order[-1] == key(run) and base_of(run) == BASE
    for one in ancestry(run):
        assert all(order.index(key(parent)) < order.index(key(one)) for parent in parents(one))


# ---------------------------------------------------------------- batches


def rows(n: int, offset: int = 0) -> list[Encoded]:
    return [Encoded([offset + i, 1], [-100, 1]) for i in range(n)]


def test_an_epoch_holds_every_example_once():
    batches = Batches([rows(10), rows(6, 100)], 4, 3, pad=0)
    seen = [int(row[0]) for step in range(4) for row in batches.batch(step, CPU).input_ids]
    assert sorted(seen) == [*range(10), *range(100, 106)] and batches.steps(1.0) == 4
    again = [int(row[0]) for step in range(4, 8) for row in batches.batch(step, CPU).input_ids]
    assert sorted(again) == sorted(seen) and again != seen


def test_a_batch_depends_on_seed_and_step_alone():
    one, other = (Batches([rows(50)], 8, 3, pad=0) for _ in range(2))
    for step in (0, 1, 2, 3, 4, 5, 6):
        one.batch(step, CPU)
    assert torch.equal(one.batch(5, CPU).input_ids, other.batch(5, CPU).input_ids)
    assert not torch.equal(
        one.batch(0, CPU).input_ids, Batches([rows(50)], 8, 4, pad=0).batch(0, CPU).input_ids
    )


@pytest.mark.parametrize("share", [0.01, 0.05, 0.25])
def test_replay_meets_its_share_over_the_steps(share):
    batches = Batches([rows(400)], 8, 1, pad=0, replayed=rows(20, 1000), replay=share)
    taken = [batches.batch(step, CPU) for step in range(100)]
    assert all(len(batch.task) == 8 for batch in taken)
    replayed = torch.cat([batch.task for batch in taken]) == REPLAYED
    assert int(replayed.sum()) == round(800 * share)
    assert bool((torch.cat([batch.input_ids for batch in taken])[replayed, 0] >= 1000).all())


def test_replay_without_anything_to_replay(tmp_path):
    alone = Train(before=BASE, tasks=(SUMS,), evaluate=(), recipe=RECIPE, method=Replay())
    with pytest.raises(ReproError, match="nothing to replay"):
        ensure(alone, shop(tmp_path, keep=[BASE]))


def test_schedules():
    factors = {
        kind: [
            lr_factor(Recipe(lr=1, steps=10, schedule=kind, warmup=0.2, floor=0.1), step, 10)
            for step in range(10)
        ]
        for kind in ("cosine", "linear", "constant")
    }
    assert all(values[:2] == [0.5, 1.0] for values in factors.values())
    assert factors["constant"][2:] == [1.0] * 8
    assert factors["linear"][6] == pytest.approx(1 - 0.9 * 4 / 8)
    assert factors["cosine"][6] == pytest.approx(0.55)


# ---------------------------------------------------------------- one run


def test_accumulation_changes_the_gradient_by_rounding_alone(tmp_path):
    runs = [second(recipe=RECIPE.model_copy(update={"accumulation": n})) for n in (1, 4)]
    points = [ensure(run, shop(tmp_path, [run.before, BASE])).series["curve"]["points"] for run in runs]
    losses = [[point["loss"] for point in one] for one in points]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


DROPOUT = BASE.model_copy(
    update={"model": MODEL.model_copy(update={"config": {**MODEL.config, "attention_dropout": 0.3}})}
)


@pytest.mark.parametrize(
    ("method", "base"),
    [(Epi(ratio=0.2, interval=2), BASE), (Full(), BASE), (Full(), DROPOUT)],
    ids=["epi", "torch", "dropout"],
)
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, method, base):
    run = second(method, observe=("stability",)).model_copy(update={"before": first(before=base)})
    ensure(run, shop(tmp_path / "whole", [*ancestry(run)]))
    halves = tmp_path / "halves"
    ensure(run.before, shop(halves, [*ancestry(run)]))

    class AfterThree(Limits):
        """The time is over when three steps are done."""

    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if done == 3:
            limits.deadline = time.time()

    limits = Limits(tick=tick)
    with pytest.raises(Stopped):
        execute(run, shop(halves, [*ancestry(run)], limits))
    store = Store(halves)
    assert store.progress(run).is_file() and store.manifest(run) is None
    torch.manual_seed(9)  # as another process would be
    execute(run, shop(halves, [*ancestry(run)]))
    assert same(weights(halves, run), weights(tmp_path / "whole", run))
    assert not store.progress(run).exists()
    whole, resumed = Store(tmp_path / "whole").manifest(run), store.manifest(run)
    assert whole is not None and resumed is not None
    assert (whole.scores, whole.losses, whole.series) == (resumed.scores, resumed.losses, resumed.series)


def test_an_interpolation_is_the_mean_of_its_ends(tmp_path):
    run = second()
    middle = halfway(run)
    ensure(middle, shop(tmp_path, [*ancestry(middle)]))
    ends = weights(tmp_path, run.before), weights(tmp_path, run)
    for name, value in weights(tmp_path, middle).items():
        torch.testing.assert_close(value, (ends[0][name] + ends[1][name]) / 2)


def test_a_leaf_keeps_no_weights_and_is_made_again_when_they_are_needed(tmp_path):
    run = second()
    Plan.of([run])
    sweep(Plan.of([run]), Store(tmp_path), device=CPU, workers=1)
    assert [path.name for path in (tmp_path / key(run)).iterdir()] == [MANIFEST]
    assert (tmp_path / key(run.before) / ISOLATION).is_file()
    assert Plan.of([run]).missing(Store(tmp_path)) == []
    assert Plan.of([halfway(run)]).missing(Store(tmp_path)) == [key(run), key(halfway(run))]


def test_weights_are_discarded_once_nothing_left_starts_from_them(tmp_path):
    moved = second(Static(by="delta", ratio=0.2))  # needs what the stage before started from, too
    plan, store = Plan.of([halfway(second()), moved, cpift(tau=0.0), cpift(tau=1.0)]), Store(tmp_path)
    late = key(halfway(second()))
    sweep(plan, store, device=CPU, workers=1, discard=True)
    assert not list(tmp_path.glob("*/*.safetensors")), "inner runs of CPI-FT included"
    assert plan.missing(store) == [] and set(plan.manifests(store)) == set(plan.runs)
    assert sweep(plan, store, device=CPU, workers=1, discard=True).finished == 0
    shutil.rmtree(tmp_path / late)  # asked for again, it makes what it starts from again
    assert plan.missing(store) == [
        name for name in plan.runs if name in map(key, ancestry(halfway(second())))
    ]


# ---------------------------------------------------------------- CPI-FT


@pytest.mark.parametrize(
    ("options", "stages"),
    [({"tau": 0.0}, 1), ({"tau": 1.0}, 3), ({"tau": 1.0, "reading": "all"}, 3),
     ({"tau": 1.0, "reading": "all", "single_stage": True}, 1)],
    ids=["one-group", "each-alone", "all-frozen", "single-stage"],
)  # fmt: skip
def test_cpift_freezes_the_cores_it_says(tmp_path, options, stages):
    run = cpift(**options)
    bench = shop(tmp_path, [*ancestry(run)])
    manifest = ensure(run, bench)
    groups, _ = cpift_.groups_of(run, bench)
    last = cpift_.unfold(run, groups)
    consolidated = [one for one in ancestry(last) if isinstance(one, Train) and one.sampled < 1]
    assert len(consolidated) == stages and manifest.notes["last"] == key(last)
    assert sum(len(group) for group in manifest.notes["groups"]) == 3
    # the last stage is a leaf without weights; made again with them, to compare
    kept = replace(bench, keep=bench.keep | {key(one) for one in ancestry(last)})
    ensure(last, kept)
    for one in consolidated:
        before, after = weights(tmp_path, one.before), weights(tmp_path, one)
        cores = [CoreFile(core_of(probe, run.core_ratio, bench)) for probe in one.frozen]
        for name in before:
            frozen = (
                union_mask(cores, name).view(before[name].shape)
                if cores
                else torch.zeros_like(before[name]).bool()
            )
            assert torch.equal(before[name][frozen], after[name][frozen])
            assert not torch.equal(before[name][~frozen], after[name][~frozen])


def test_cpift_consolidates_on_the_same_examples_in_stages_and_in_one():
    run = cpift(tau=1.0, reading="all")
    unequal = (run.tasks[0].model_copy(update={"train": 40}), *run.tasks[1:])
    run = run.model_copy(update={"tasks": unequal})
    single = cpift_.unfold(run.model_copy(update={"single_stage": True}), [[2], [0, 1]])
    last = cpift_.unfold(run, [[2], [0, 1]])
    tokenizer = tokenizer_of(MODEL)

    def learned(one: Train) -> dict[str, list[list[int]]]:
        found = zip(one.tasks, _sampled(one, tokenizer), strict=True)
        return {task.kind: sorted(row.input_ids for row in rows) for task, rows in found}

    assert learned(single) == learned(last) | learned(last.before)
    assert {kind: len(rows) for kind, rows in learned(single).items()} == {
        "sums": 40,
        "strings": 47,
        "topics": 47,
    }


def test_a_curriculum_compares_scores_by_their_full_marks(tmp_path, monkeypatch):
    """9 of a judge's 10 points are easier than 60 %."""
    scores = {"sums": 60.0, "strings": 9.0, "topics": 95.0}
    marks = {"sums": 100.0, "strings": 10.0, "topics": 100.0}
    run = cpift(order="curriculum")
    bench = shop(tmp_path)
    known = {key(probe): {task.kind: scores[task.kind]} for probe, task in zip(run.probes, run.tasks)}
    monkeypatch.setattr(
        Store, "manifest", lambda self, one: SimpleNamespace(key=key(one), scores=known[key(one)])
    )
    monkeypatch.setattr(cpift_, "make_task", lambda task: SimpleNamespace(full_mark=marks[task.kind]))
    monkeypatch.setattr(cpift_, "core_of", lambda *_: None)
    monkeypatch.setattr(cpift_, "CoreFile", lambda _: None)
    monkeypatch.setattr(cpift_, "jaccard_matrix", lambda _: [[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    assert cpift_.groups_of(run, bench)[0] == [[2], [1], [0]]
    known[key(run.probes[1])] = {"sums": 1.0}
    with pytest.raises(ReproError, match="not scored on strings"):
        cpift_.groups_of(run, bench)
    assert len(cpift_.groups_of(cpift(), bench)[0]) == 3, "no other order needs a score"


def test_a_single_stage_freezes_all_cores():
    with pytest.raises(ValidationError, match='needs reading "all"'):
        cpift(single_stage=True)


def test_who_waited_for_a_run_holds_the_lock_that_others_see(tmp_path):
    """A lock's file goes with its holder: one that waited on it must not hold a file that nobody finds."""
    store, run, order = Store(tmp_path), first(), []

    def hold(name: str) -> None:
        with store.claim(run):
            order.append(f"{name} in")
            time.sleep(0.05)
            order.append(f"{name} out")

    threads = [Thread(target=hold, args=(name,)) for name in "abcdef"]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert [one.split()[0] for one in order[::2]] == [one.split()[0] for one in order[1::2]]
    assert [one.split()[1] for one in order] == ["in", "out"] * 6 and not list(tmp_path.glob("*.lock"))


def test_replayed_examples_are_those_that_the_stage_before_learned():
    run = second(Replay(), seed=2).model_copy(update={"before": first(seed=7)})
    tokenizer = tokenizer_of(MODEL)
    found = [row.input_ids for row in _replayed(run, tokenizer)]
    assert found == [row.input_ids for row in encoded(tokenizer, SUMS, 7, RECIPE.max_length).examples]


def test_people_read_what_a_share_is_of():
    assert describe(second(Replay(share=0.05))).startswith(
        "replay (replayed rows of every batch 0.05) on strings"
    )
    assert describe(second(Static())).startswith("static on strings")


def test_a_share_is_of_data_that_the_stage_has_too():
    with pytest.raises(ValidationError, match="must hold the tasks of this stage"):
        Train(before=BASE, tasks=(SUMS,), sampled=0.5, sampled_of=(STRINGS,), evaluate=(), recipe=RECIPE)


# ---------------------------------------------------------------- sweeps


def test_a_sweep_on_two_processes_makes_each_run_once_and_never_again(tmp_path):
    leaves = [second(seed=seed) for seed in (1, 2)] + [second(Full(), seed=1)]
    plan, store = Plan.of(leaves), Store(tmp_path)
    assert len(plan.runs) == 6  # one base, a stage A a seed
    outcome = sweep(plan, store, device=CPU, workers=2, discard=True)
    assert (outcome.finished, outcome.left) == (6, 0)
    assert not list(tmp_path.glob("*/*.safetensors"))
    written = {name: (tmp_path / name / MANIFEST).stat().st_mtime_ns for name in plan.runs}
    assert sweep(plan, store, device=CPU, workers=2).finished == 0
    assert written == {name: (tmp_path / name / MANIFEST).stat().st_mtime_ns for name in plan.runs}
    assert set(plan.manifests(store)) == set(plan.runs)


def test_a_sweep_out_of_time_leaves_the_rest(tmp_path):
    plan, store = Plan.of([second()]), Store(tmp_path)
    outcome = sweep(plan, store, device=CPU, workers=1, time_limit_s=0.0)
    assert (outcome.finished, outcome.left) == (0, 3)
    assert sweep(plan, store, device=CPU, workers=1).finished == 3


def test_two_sweeps_in_one_folder(tmp_path):
    store = Store(tmp_path)
    with store.lock(), pytest.raises(ReproError, match="another sweep"):
        sweep(Plan.of([BASE]), Store(tmp_path), device=CPU, workers=1)


def test_a_manifest_cut_off_in_the_middle_is_named(tmp_path):
    store = Store(tmp_path)
    execute(BASE, shop(tmp_path))
    path = tmp_path / key(BASE) / MANIFEST
    path.write_text(path.read_text()[:100])
    with pytest.raises(ReproError, match=key(BASE)):
        store.manifest(BASE)


def test_a_folder_of_another_run_is_named(tmp_path):
    store, other = Store(tmp_path), BASE.model_copy(update={"seed": 7})
    execute(BASE, shop(tmp_path))
    (tmp_path / key(BASE)).rename(tmp_path / key(other))
    with pytest.raises(ReproError, match=f"is of the run {key(BASE)}"):
        store.manifest(other)


def test_a_run_that_diverged_can_be_read_back(tmp_path):
    execute(BASE, shop(tmp_path))
    found = Store(tmp_path).manifest(BASE)
    lost = found.model_copy(update={"losses": {"sums": float("nan")}, "series": {"loss": [float("inf")]}})
    Store(tmp_path).write(BASE, lost, None)
    back = Store(tmp_path).manifest(BASE)
    assert math.isnan(back.losses["sums"]) and back.series["loss"] == [float("inf")]


def test_an_unknown_kind_of_task_stops_the_sweep_and_keeps_what_is_done(tmp_path):
    wrong = Train(before=BASE, tasks=(SUMS.model_copy(update={"kind": "sumz"}),), evaluate=(), recipe=RECIPE)
    with pytest.raises(ReproError, match="sumz"):
        sweep(Plan.of([wrong]), Store(tmp_path), device=CPU, workers=1)
    assert Store(tmp_path).manifest(BASE) is not None


def test_the_model_of_a_wrong_config():
    from epi_kernels.repro.models import new_model

    with pytest.raises(ReproError, match="config"):
        new_model(MODEL.model_copy(update={"config": {"model_type": "nothing"}}), 0)
    assert STRINGS.kind == "strings"
