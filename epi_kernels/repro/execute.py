"""One run from its description to its folder."""

from __future__ import annotations

import datetime
import gc
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from epi_kernels import provenance
from epi_kernels.finetune.checkpoint import DiskFull, is_disk_full
from epi_kernels.finetune.errors import UserError
from epi_kernels.repro import cpift
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.manifest import Manifest
from epi_kernels.repro.runs import Base, CpiFt, Fuse, Interpolate, Run, Train, ancestry, key, parents
from epi_kernels.repro.stages import run_base, run_train
from epi_kernels.repro.weights import run_fuse, run_interpolate
from epi_kernels.repro.workshop import Result, Workshop

KEPT = "finished runs are kept"
PACKAGES = ("torch", "transformers", "numpy", "peft")


def execute(run: Run, shop: Workshop) -> Manifest:
    """Makes a run whose parents are there, and writes its folder; the manifest of one that is there.

    Raises:
        ReproError: what a user can mend; finished runs are kept.
        Stopped: the time limit; the run goes on from where it was.
    """
    shop.store.folder.mkdir(parents=True, exist_ok=True)
    with shop.store.claim(run):
        if shop.store.finished(run, with_weights=key(run) in shop.keep):
            manifest = shop.store.manifest(run)
            assert manifest is not None
            return manifest
        try:
            return _execute(run, shop)
        except torch.OutOfMemoryError as error:
            raise ReproError(
                f"{_told(run)}: the device's memory is too small ({error}); {KEPT}: leave the arm out by --without, or make accumulation larger in the preset"
            ) from None
        except (
            UserError
        ) as error:  # a chat template that refuses an example, checkpoints that do not fit together
            raise ReproError(f"{_told(run)}: {error}; {KEPT}") from None
        except (DiskFull, OSError, RuntimeError) as error:  # torch.save's own are RuntimeErrors
            if not isinstance(error, DiskFull) and not is_disk_full(error, shop.store.folder):
                raise
            raise ReproError(
                f"{_told(run)}: no space left on the disk of {shop.store.folder}; {KEPT}: make room and run the same"
                " command again"
            ) from None


def _told(run: Run) -> str:
    method = f" by {run.method.name}" if isinstance(run, Train) else ""
    on = f" on {', '.join(task.kind for task in run.tasks)}" if isinstance(run, Train | CpiFt) else ""
    return f"run {key(run)} ({run.kind}{method}{on}, seed {run.seed})"


def _free(device: torch.device) -> None:
    """A stage and its method refer to each other: the model of the run before is there until it is looked for."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _execute(run: Run, shop: Workshop) -> Manifest:
    _free(shop.device)
    started = time.perf_counter()
    result = _make(run, shop)
    manifest = Manifest(
        key=key(run),
        run=run,
        seed=run.seed,
        commit=provenance.git(Path(__file__).parent, "rev-parse", "--short=10", "HEAD"),
        versions=provenance.versions(*PACKAGES),
        machine=provenance.machine() | _gpu(shop.device),
        finished=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        seconds=round(time.perf_counter() - started, 2),
        scores=result.scores,
        losses=result.losses,
        **result.facts,
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
    shop = replace(shop, keep=shop.keep | inner)
    manifest = ensure(last, shop)
    facts = {"bytes": manifest.bytes, "time": manifest.time}
    notes = manifest.notes | cpift.describe(groups, similarity, run, manifest)
    return Result(manifest.scores, manifest.losses, _nothing, facts | {"notes": notes})


def _nothing(folder: Path) -> None:
    """The weights are those of the last of its runs."""


def _gpu(device: torch.device) -> dict[str, Any]:
    return {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
