"""Sweeps: each run once, whatever stops them; what lies in a folder of runs is told apart."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from threading import Thread
from types import SimpleNamespace

import pytest
from repro_runs import BASE, MODEL, RECIPE, STRINGS, SUMS, first, second

from epi_kernels.repro import sweep as sweep_
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.execute import execute
from epi_kernels.repro.methods.config import Full
from epi_kernels.repro.runs import Train, key
from epi_kernels.repro.store import MANIFEST, Store
from epi_kernels.repro.sweep import Plan, sweep
from python_tests.run_shop import CPU, shop


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


def test_no_run_waits_for_a_worker_beyond_the_time(tmp_path, monkeypatch):
    """Each worker has one run at a time; once the time is over no other is handed out."""
    under_way, most = [], []

    def submit(*_: object) -> Future:
        under_way.append(Future())
        return under_way[-1]

    def wait(futures, **_):
        most.append(len(futures))
        ended = next(iter(futures))
        ended.set_result(True)
        return {ended}, set()

    @contextmanager
    def processes(workers: int):
        yield SimpleNamespace(submit=submit), lambda: 0

    monkeypatch.setattr(sweep_, "processes", processes)
    monkeypatch.setattr(sweep_, "wait", wait)
    monkeypatch.setattr(sweep_._Job, "is_over", lambda job: len(most) >= 3)
    bases = [BASE.model_copy(update={"seed": seed}) for seed in range(8)]
    outcome = sweep(Plan.of(bases), Store(tmp_path), device=CPU, workers=2)
    assert most == [2, 2, 2, 1]
    assert outcome.finished == len(under_way) == 4 and outcome.left == 4


def test_a_worker_that_the_system_ends_is_said_so(tmp_path, monkeypatch):
    """As where memory runs out: the pool has one answer for all that was under way."""

    def submit(*_: object) -> Future:
        broken: Future = Future()
        broken.set_exception(BrokenProcessPool("A process in the process pool was terminated abruptly"))
        return broken

    @contextmanager
    def processes(workers: int):
        yield SimpleNamespace(submit=submit), lambda: 0

    monkeypatch.setattr(sweep_, "processes", processes)
    with pytest.raises(ReproError, match=r"ended from outside.*finished runs are kept.*fewer workers than 2"):
        sweep(Plan.of([BASE]), Store(tmp_path), device=CPU, workers=2)


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
