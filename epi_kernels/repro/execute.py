"""One run from its description to its folder."""

from __future__ import annotations

import contextlib
import datetime
import gc
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from epi_kernels import provenance
from epi_kernels.finetune.checkpoint import DiskFull, is_disk_full
from epi_kernels.finetune.errors import UserError
from epi_kernels.repro import cpift
from epi_kernels.repro.contents import refuse_changed
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.manifest import Manifest
from epi_kernels.repro.measure.cost import mean_time, most
from epi_kernels.repro.pins import commits
from epi_kernels.repro.runs import (
    Base,
    CpiFt,
    Fuse,
    Interpolate,
    Run,
    Train,
    ancestry,
    base_of,
    key,
    parents,
)
from epi_kernels.repro.stages import run_base, run_train
from epi_kernels.repro.store import Store
from epi_kernels.repro.weights import run_fuse, run_interpolate
from epi_kernels.repro.workshop import Result, Workshop

KEPT = "finished runs are kept"
PART_OF = "part_of"  # in the notes of a run that a CPI-FT run made for itself: that one's key
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "peft", "datasets", "lm_eval")


def execute(run: Run, shop: Workshop) -> Manifest:
    """Makes a run whose parents are there, and writes its folder; the manifest of one that is there. A call of all ranks.

    Raises:
        UserError: what a user can mend (of one rank: ReproError); finished runs are kept.
        Stopped: the time limit; the run goes on from where it was.
    """
    with contextlib.ExitStack() as claimed:
        found = shop.ranks.first_does(_claim, run, shop, claimed)
        if found is not None:
            return found
        with _told(run, shop.store.folder):
            return _execute(run, shop)


@contextlib.contextmanager
def _told(run: Run, folder: Path) -> Iterator[None]:
    """What a user can mend as a ReproError that names the run."""
    method = f" by {run.method.name}" if isinstance(run, Train) else ""
    on = f" on {', '.join(task.kind for task in run.tasks)}" if isinstance(run, Train | CpiFt) else ""
    what = f"run {key(run)} ({run.kind}{method}{on}, seed {run.seed})"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ReproError(
            f"{what}: the device's memory is too small ({error}); {KEPT}: leave the arm out by --without, or make"
            " accumulation larger in the preset"
        ) from None
    except (
        UserError
    ) as error:  # a chat template that refuses an example, checkpoints that do not fit together
        if isinstance(error, ReproError) or error.shared:
            raise
        raise ReproError(f"{what}: {error}; {KEPT}", error.status) from None
    except (DiskFull, OSError, RuntimeError) as error:  # torch.save's own are RuntimeErrors
        if not isinstance(error, DiskFull) and not is_disk_full(error, folder):
            raise
        raise ReproError(
            f"{what}: no space left on the disk of {folder}; {KEPT}: make room and run the same command again"
        ) from None


def _free(device: torch.device) -> None:
    """A stage and its method refer to each other: the model of the run before is there until it is looked for."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _claim(run: Run, shop: Workshop, claimed: contextlib.ExitStack) -> Manifest | None:
    """The manifest of a run that is there; else others wait for it until `claimed` ends."""
    shop.store.folder.mkdir(parents=True, exist_ok=True)
    claimed.enter_context(shop.store.claim(run))
    if shop.store.finished(run, with_weights=key(run) in shop.keep):
        return shop.store.manifest(run)
    refuse_changed(run, shop.store.folder)
    return None


def _execute(run: Run, shop: Workshop) -> Manifest:
    _free(shop.device)
    started = time.perf_counter()
    result = _make(run, shop)
    return shop.ranks.first_does(_write, run, shop, result, result.added_s + time.perf_counter() - started)


def _write(run: Run, shop: Workshop, result: Result, seconds: float) -> Manifest:
    facts = dict(result.facts)
    if shop.part_of is not None:
        facts["notes"] = facts.get("notes", {}) | {PART_OF: shop.part_of}
    manifest = Manifest(
        key=key(run),
        run=run,
        seed=run.seed,
        **_source(),
        versions=provenance.versions(*PACKAGES),
        machine=provenance.machine() | _gpu(shop.device) | _ranks(shop),
        finished=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        seconds=round(seconds, 2),
        scores=result.scores,
        losses=result.losses,
        hub=_from_hub(run),
        **facts,
    )
    shop.store.write(run, manifest, result.write_model if key(run) in shop.keep else None)
    return manifest


def ensure(run: Run, shop: Workshop) -> Manifest:
    """The manifest of a run, made with all it rests on where it is missing."""
    for one in ancestry(run):
        manifest = execute(one, shop)
    return manifest  # pyright: ignore[reportPossiblyUnboundVariable]  # a run is its own last ancestor


def _make(run: Run, shop: Workshop) -> Result:
    match run:
        case Base():
            return run_base(run, shop)
        case Train():
            return run_train(run, shop)
        case Interpolate():
            return run_interpolate(run, shop)
        case Fuse():
            return run_fuse(run, shop)
        case CpiFt():
            return _cpift(run, shop)


def _cpift(run: CpiFt, shop: Workshop) -> Result:
    groups, similarity = cpift.groups_of(run, shop)
    last = cpift.unfold(run, groups)
    inner = {key(parent) for one in ancestry(last) for parent in parents(one)}
    shop = replace(shop, keep=shop.keep | inner, part_of=key(run))
    began = time.perf_counter()
    manifest = ensure(last, shop)
    spent = time.perf_counter() - began
    made = shop.ranks.first_does(_parts, run, last, shop.store)
    stages = [one for one in made if isinstance(one.run, Train)]
    facts = {
        "bytes": most([one.bytes for one in stages if one.bytes]),
        "time": mean_time([one.time for one in stages if one.time]),
    }
    notes = manifest.notes | cpift.describe(groups, similarity, run, manifest) | {"stages": len(stages)}
    notes.pop(PART_OF, None)  # the last part's
    # What its parts took, in earlier calls too, in place of what passed here; those that another run made are not its.
    own = math.fsum(one.seconds for one in made if one.notes.get(PART_OF) == key(run))
    return Result(manifest.scores, manifest.losses, _nothing, facts | {"notes": notes}, own - spent)


def _parts(run: CpiFt, last: Run, store: Store) -> list[Manifest]:
    """Of everything that it consists of: probes, a stage a group, fusion, consolidation."""
    given = {key(one) for one in ancestry(run.before)}
    parts = {key(one): one for one in ancestry(last)}
    found = [store.manifest(one) for name, one in parts.items() if name not in given]
    return [one for one in found if one is not None]


def _from_hub(run: Run) -> dict[str, str]:
    """The commits of its data and tokenizer; of a base model of its weights, too."""
    tasks = run.tasks if isinstance(run, Train | CpiFt) else ()
    return commits([base_of(run).model, *tasks, *run.evaluate])


def _nothing(folder: Path) -> None:
    """The weights are those of the last of its runs."""


@lru_cache(maxsize=1)
def _source() -> dict[str, Any]:
    """Of the package, as this process began with it."""
    package = Path(__file__).parents[1]
    changed = provenance.git(package, "status", "--porcelain", "--", ".")
    return {
        "commit": provenance.git(package, "rev-parse", "--short=10", "HEAD"),
        "dirty": None if changed is None else bool(changed),
    }


def _ranks(shop: Workshop) -> dict[str, Any]:
    return {"ranks": shop.ranks.size, "fsdp": shop.fsdp} if shop.ranks.size > 1 else {}


def _gpu(device: torch.device) -> dict[str, Any]:
    return {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
