"""CPI-FT's runs, and which examples their stages and replayed ones learn."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from repro_runs import BASE, MODEL, RECIPE, STRINGS, SUMS, cpift, first, manifests, second

from epi_kernels.isolation.core_file import CoreFile, union_mask
from epi_kernels.repro import cpift as cpift_
from epi_kernels.repro.describe import describe
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.execute import PART_OF, ensure, execute
from epi_kernels.repro.measure.cost import mean_time, most
from epi_kernels.repro.methods.config import Replay, Static
from epi_kernels.repro.models import tokenizer_of
from epi_kernels.repro.runs import Train, ancestry, key, parents
from epi_kernels.repro.stages import _replayed, _sampled
from epi_kernels.repro.store import MANIFEST, Store
from epi_kernels.repro.train import Limits, Stopped
from epi_kernels.repro.weights import core_of
from epi_kernels.repro.workshop import encoded
from python_tests.run_shop import shop, weights


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
    trained = {key(one): one for one in ancestry(last) if isinstance(one, Train)}
    assert manifest.notes["stages"] == len(trained) == 3 + len(groups) + stages
    costs = [bench.store.manifest(one) for one in trained.values()]
    assert manifest.bytes == most([one.bytes for one in costs])
    assert manifest.time.steps == sum(one.time.steps for one in costs) > costs[-1].time.steps
    assert manifest.time == mean_time([one.time for one in costs])
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


def test_seconds_are_of_its_parts_whenever_they_were_made(tmp_path):
    """Stopped after its first part is there: what that took counts when it goes on, and for no other run."""
    run = cpift(tau=1.0)
    for parent in parents(run):
        ensure(parent, shop(tmp_path, [*ancestry(run)]))
    steps = 0

    def tick() -> None:
        nonlocal steps
        steps += 1
        limits.deadline = time.time() if steps > RECIPE.steps else None

    limits = Limits(tick=tick)
    with pytest.raises(Stopped):
        execute(run, shop(tmp_path, [*ancestry(run)], limits))
    ((name, made),) = [
        (name, one) for name, one in manifests(tmp_path).items() if one["notes"].get(PART_OF) == key(run)
    ]
    (tmp_path / name / MANIFEST).write_text(json.dumps(made | {"seconds": 1000.0}))
    whole = execute(run, shop(tmp_path, [*ancestry(run)]))
    assert 1000 < whole.seconds < 1060 and PART_OF not in whole.notes
    alike = execute(run.model_copy(update={"tau": 0.9}), shop(tmp_path, [*ancestry(run)]))
    assert alike.scores == whole.scores and alike.seconds < 60


def test_a_single_stage_freezes_all_cores():
    with pytest.raises(ValidationError, match='needs reading "all"'):
        cpift(single_stage=True)


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
