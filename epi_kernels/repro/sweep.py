"""All runs that some tables need, made once, parents first: on processes of one thread each, on one GPU, or one after
the other by all ranks that a launcher started.

Killed or stopped by a time limit, the same call goes on: finished runs are whole on the disk, unfinished ones go on
from what they saved.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from epi_kernels.finetune.ranks import Ranks
from epi_kernels.repro import sharded
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.execute import execute
from epi_kernels.repro.manifest import Manifest
from epi_kernels.repro.runs import CpiFt, Run, ancestry, key, parents
from epi_kernels.repro.store import Store
from epi_kernels.repro.train import Limits, Stopped
from epi_kernels.repro.workshop import Workshop
from epi_kernels.workers import processes, tick

Ended = Callable[[str], None]  # told the key of a run that is finished


@dataclass(frozen=True)
class Plan:
    """What is to be made, by key, parents before children, and which runs each one starts from."""

    runs: Mapping[str, Run]
    needs: Mapping[str, frozenset[str]]

    @classmethod
    def of(cls, wanted: Iterable[Run]) -> Plan:
        runs = {key(run): run for leaf in wanted for run in ancestry(leaf)}
        return cls(runs, {name: frozenset(map(key, parents(run))) for name, run in runs.items()})

    @property
    def keep(self) -> frozenset[str]:
        """Those that others start from: their weights are written."""
        return frozenset(name for needs in self.needs.values() for name in needs)

    def missing(self, store: Store) -> list[str]:
        """What is not finished; and, of what is, those without the weights that a missing one starts from."""
        left: set[str] = set()
        for name in reversed(list(self.runs)):  # children before parents
            needed = any(name in self.needs[child] for child in left)
            if not store.finished(self.runs[name], with_weights=needed):
                left.add(name)
        return [name for name in self.runs if name in left]

    def discard(self, store: Store, name: str, left: Collection[str]) -> None:
        """Once a run is finished: removes weights that none of those left starts from, of its parents and, where it is
        the last CPI-FT run of its probes, of the runs that such runs consist of."""
        for parent in self.needs[name]:
            if not any(parent in self.needs[child] for child in left):
                store.drop_weights(self.runs[parent])
        run = self.runs[name]
        if not isinstance(run, CpiFt):
            return
        alike = [
            one for one, other in self.runs.items() if isinstance(other, CpiFt) and other.probes == run.probes
        ]
        if any(one in left for one in alike):
            return
        for one in alike:
            manifest = store.manifest(self.runs[one])
            assert manifest is not None, "it is finished"
            last = store.manifest_of(manifest.notes["last"])
            for inner in ancestry(last.run) if last is not None else ():
                if key(inner) not in self.runs:
                    store.drop_weights(inner)

    def manifests(self, store: Store) -> dict[str, Manifest]:
        """Of the finished ones."""
        found = {name: store.manifest(run) for name, run in self.runs.items()}
        return {name: manifest for name, manifest in found.items() if manifest is not None}


@dataclass
class Outcome:
    """What a call of `sweep` did."""

    finished: int
    left: int
    seconds: float


def sweep(
    plan: Plan,
    store: Store,
    *,
    device: torch.device,
    workers: int,
    time_limit_s: float | None = None,
    progress: Any = None,
    ranks: Ranks | None = None,
    fsdp: bool = False,
    discard: bool = False,
) -> Outcome:
    """Makes what is missing, as far as the time goes.

    `progress`: a tqdm bar in training steps; None shows nothing. `ranks`: make every run together; then it is a call of
    all of them, with one worker, and `store` is one folder that all see. `fsdp`: with the stages sharded over them.
    `discard`: weights are removed as soon as no run that is left starts from them.

    Raises:
        UserError: a run failed for a reason that a user can mend (of one rank: ReproError); finished runs are kept.
    """
    started, ranks = time.time(), ranks or Ranks()
    assert workers == 1 or ranks.size == 1, "ranks share each run's rows"
    deadline = started + time_limit_s if time_limit_s is not None else None
    with contextlib.ExitStack() as locked:
        missing = ranks.first_does(_begin, plan, store, locked)
        if fsdp and ranks.size > 1:
            ranks.together(sharded.refuse, [plan.runs[name] for name in missing])
        job = _Job(store.folder, str(device), deadline, plan.keep, ranks, fsdp)
        ended = partial(ranks.first_does, _Ended(plan, store, set(missing))) if discard else _ignored
        for name in plan.runs:  # of a sweep that was stopped
            if name not in missing:
                ended(name)
        make = _alone if workers == 1 else partial(_together, workers=workers)
        done = make(job, plan, missing, progress=progress, ended=ended)
    return Outcome(done, len(missing) - done, time.time() - started)


@dataclass
class _Ended:
    plan: Plan
    store: Store
    left: set[str]

    def __call__(self, name: str) -> None:
        self.left.discard(name)
        self.plan.discard(self.store, name, self.left)


def _ignored(name: str) -> None:
    pass


def _begin(plan: Plan, store: Store, locked: contextlib.ExitStack) -> list[str]:
    """What is missing; no other sweep begins before `locked` ends."""
    locked.enter_context(store.lock())
    return plan.missing(store)


@dataclass(frozen=True)
class _Job:
    folder: Path
    device: str
    deadline: float | None
    keep: frozenset[str]
    ranks: Ranks
    fsdp: bool

    def shop(self, on_step: Any) -> Workshop:
        limits = Limits(self.deadline, tick=on_step)
        return Workshop(
            Store(self.folder), torch.device(self.device), limits, self.keep, self.ranks, self.fsdp
        )

    def is_over(self) -> bool:
        """For all ranks alike."""
        return self.ranks.highest(self.deadline is not None and time.time() >= self.deadline) > 0


def _make(job: _Job, run: Run) -> bool:
    """In a worker; whether the run was finished."""
    try:
        execute(run, job.shop(tick))
    except Stopped:
        return False
    return True


def _alone(job: _Job, plan: Plan, missing: Sequence[str], progress: Any, ended: Ended) -> int:
    shop = job.shop(progress.update if progress is not None else _nothing)
    for done, name in enumerate(missing):
        if job.is_over():
            return done
        try:
            execute(plan.runs[name], shop)
        except Stopped:
            return done
        ended(name)
    return len(missing)


def _nothing() -> None:
    pass


def _together(
    job: _Job, plan: Plan, missing: Sequence[str], progress: Any, ended: Ended, workers: int
) -> int:
    try:
        with processes(workers) as (pool, ticks):
            return _drive(pool, job, plan, missing, ticks, progress, ended, workers)
    except BrokenProcessPool:
        raise ReproError(
            "a worker process was ended from outside, where memory runs out by the system; finished runs are kept: run"
            f" the same command again, with fewer workers than {workers}"
        ) from None


def _drive(
    pool: Executor,
    job: _Job,
    plan: Plan,
    missing: Sequence[str],
    ticks: Callable[[], int],
    progress: Any,
    ended: Ended,
    workers: int,
) -> int:
    """A run is handed to a worker that is free once its parents are there: what waited in a queue would still begin when
    the time is over."""
    waiting = {name: set(plan.needs[name]) & set(missing) for name in missing}
    under_way: dict[Future, str] = {}
    done = 0
    while waiting or under_way:
        for name in [one for one, needs in waiting.items() if not needs]:
            if len(under_way) < workers and not job.is_over():
                del waiting[name]
                under_way[pool.submit(_make, job, plan.runs[name])] = name
        if not under_way:
            break
        over, _ = wait(under_way, timeout=0.5, return_when=FIRST_COMPLETED)
        for future in over:
            name = under_way.pop(future)
            if future.result():
                done += 1
                ended(name)
                for needs in waiting.values():
                    needs.discard(name)
        if progress is not None:
            progress.update(ticks() - progress.n)
    return done
