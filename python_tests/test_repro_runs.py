"""The harness around a run: keys, batches, one run resumed to the bit, a sweep that repeats nothing."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from repro_runs import BASE, MODEL, RECIPE, SUMS, cpift, first, halfway, second

from epi_kernels.finetune.chat import Encoded
from epi_kernels.repro import stages
from epi_kernels.repro.config import Recipe
from epi_kernels.repro.data import REPLAYED, Batches
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.execute import ensure, execute
from epi_kernels.repro.methods.config import Epi, Full, Replay, Static
from epi_kernels.repro.runs import Train, ancestry, base_of, key, parents
from epi_kernels.repro.store import ISOLATION, MANIFEST, Store
from epi_kernels.repro.sweep import Plan, sweep
from epi_kernels.repro.train import Limits, Stopped, lr_factor, read_progress
from python_tests.run_shop import CPU, same, shop, weights

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
    first = torch.cat([batch.input_ids for batch in taken])[:, 0]
    assert bool((first[replayed] >= 1000).all())
    for rows_of, n in ((first[~replayed], 400), (first[replayed], 20)):  # each once before any comes again
        assert len(set(rows_of[:n].tolist())) == min(n, len(rows_of))


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
    saved = torch.load(store.progress(run), weights_only=True)
    assert 0 < saved["seconds"] < 60
    torch.save(saved | {"seconds": 1000.0}, store.progress(run))
    torch.manual_seed(9)  # as another process would be
    execute(run, shop(halves, [*ancestry(run)]))
    assert same(weights(halves, run), weights(tmp_path / "whole", run))
    assert not store.progress(run).exists()
    whole, resumed = Store(tmp_path / "whole").manifest(run), store.manifest(run)
    assert whole is not None and resumed is not None
    assert (whole.scores, whole.losses, whole.series) == (resumed.scores, resumed.losses, resumed.series)
    assert whole.seconds < 60 and 1000 < resumed.seconds < 1060, "the time before it was stopped counts"


def test_slices_shorter_than_a_start_get_on(tmp_path):
    run = first()
    ensure(run.before, shop(tmp_path, [*ancestry(run)]))
    late = Limits(deadline=time.time())
    for step in range(1, RECIPE.steps):
        with pytest.raises(Stopped):
            execute(run, shop(tmp_path, limits=late))
        assert read_progress(Store(tmp_path).progress(run))["step"] == step
    assert execute(run, shop(tmp_path, limits=late)).time is None, "no process saw enough steps to time one"


def test_the_first_stage_of_a_process_pays_for_no_library(tmp_path, monkeypatch):
    """A step on a model that is dropped comes before it, once for every method, and changes no bit of the stage."""
    loaded = []
    load = stages.load_model
    monkeypatch.setattr(stages, "load_model", lambda *given: loaded.append(1) or load(*given))
    monkeypatch.setattr(stages, "_LOADED", {"full", "epi"})
    run = second()
    ensure(run, shop(tmp_path / "later", [*ancestry(run)]))
    once = len(loaded)
    stages._LOADED.clear()
    ensure(run, shop(tmp_path / "first", [*ancestry(run)]))
    assert len(loaded) == 2 * once + 2 and stages._LOADED == {"full", "epi"}
    for one in ancestry(run):
        assert same(weights(tmp_path / "first", one), weights(tmp_path / "later", one))


def test_an_interpolation_has_alpha_of_the_weights_after_the_stage(tmp_path):
    run = second()
    part = halfway(run).model_copy(update={"alpha": 0.25})
    ensure(part, shop(tmp_path, [*ancestry(part)]))
    before, after = weights(tmp_path, run.before), weights(tmp_path, run)
    for name, value in weights(tmp_path, part).items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * after[name])


def test_a_leaf_keeps_no_weights_and_is_made_again_when_they_are_needed(tmp_path):
    run = second()
    Plan.of([run])
    sweep(Plan.of([run]), Store(tmp_path), device=CPU, workers=1)
    assert [path.name for path in (tmp_path / key(run)).iterdir()] == [MANIFEST]
    assert (tmp_path / key(run.before) / ISOLATION).is_file()
    assert Plan.of([run]).missing(Store(tmp_path)) == []
    assert Plan.of([halfway(run)]).missing(Store(tmp_path)) == [key(run), key(halfway(run))]


def test_weights_that_a_kill_left_half_discarded_are_made_again(tmp_path, monkeypatch):
    run, store = first(), Store(tmp_path)
    ensure(run, shop(tmp_path, [*ancestry(run)]))
    assert store.finished(run, with_weights=True)
    unlink, gone = Path.unlink, []

    def killed(path: Path, **options: bool) -> None:
        if gone and gone[-1].suffix == ".safetensors":
            raise KeyboardInterrupt
        gone.append(path)
        unlink(path, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", killed)
        store.drop_weights(run)
    assert list((tmp_path / key(run)).glob("*.safetensors")), "one of two is left"
    assert store.finished(run, with_weights=False) and not store.finished(run, with_weights=True)
    ensure(run, shop(tmp_path, [*ancestry(run)]))
    assert store.finished(run, with_weights=True)


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
