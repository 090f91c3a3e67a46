"""`epi-kernels isolate`: CPI-FT's core regions, groups and fusion, on checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from epi_kernels.files import write_whole
from epi_kernels.finetune.checkpoint import DiskFull, is_disk_full
from epi_kernels.finetune.errors import UserError
from epi_kernels.text import columns

from .arguments import add_arguments
from .checkpoints import Checkpoint, floating
from .consolidated import plan_stages
from .core import PASSES, save_core
from .core_file import CoreFile
from .errors import IsolationError
from .fusion import fuse_checkpoints
from .grouping import group_tasks
from .overlap import intersections, similarity_of
from .staging import order_groups

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 written, 1 the disk is full, 2 something given is wrong, 130 interrupted (nothing written)."""
    action = {"core": _core, "groups": _groups, "fuse": _fuse}[args.action]
    try:
        action(args)
    except (UserError, DiskFull) as error:
        print(f"epi-kernels isolate {args.action}: {error}", file=sys.stderr)
        return getattr(error, "status", 1)
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return 130
    except OSError as error:
        out = getattr(args, "out", None) or getattr(args, "json", None) or "."
        full = is_disk_full(error, Path(out).resolve().parent)
        if not full and not isinstance(error, PermissionError | NotADirectoryError):
            raise
        reason = "no space left on its disk" if full else error.strerror
        where = out if full else error.filename or out
        print(f"epi-kernels isolate {args.action}: {where}: cannot be written ({reason})", file=sys.stderr)
        return 1 if full else 2
    return 0


@contextlib.contextmanager
def _bar(what: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    from tqdm import tqdm

    disable = quiet or not sys.stderr.isatty()
    with tqdm(total=total, desc=what, unit="weight", unit_scale=True, disable=disable) as bar:

        def advance(elements: int) -> None:
            bar.update(elements)

        yield advance


def _require_file(flag: str, path: Path, overwrite: bool) -> None:
    """A file that may be written there."""
    if path.is_dir():
        raise IsolationError(f"{flag} {path} is a directory; name a file")
    if path.exists() and not overwrite:
        raise IsolationError(f"{flag} {path} exists; --overwrite replaces it")
    parent = path.resolve().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise IsolationError(f"{flag} {path}: its directory does not exist or is not writable")


def _refuse_source(flag: str, path: Path, read: Collection[Path]) -> None:
    """What a command writes must not replace what it reads."""
    if path.exists() and any(path.samefile(one) for one in read):
        raise IsolationError(f"{flag} {path} would replace what it is made from")


def _elements(path: str) -> int:
    return sum(info.numel for info in floating(Checkpoint(path)).values())


def _core(args: argparse.Namespace) -> None:
    out = Path(args.out)
    _require_file("--out", out, args.overwrite)
    _refuse_source("--out", out, Checkpoint(args.base).files | Checkpoint(args.tuned).files)
    with _bar("core", PASSES * _elements(args.base), args.quiet) as advance:
        summary = save_core(args.base, args.tuned, out, args.ratio, advance)
    print(
        f"core: {summary.selected} of {summary.elements} weights, those that moved by {summary.threshold:.3g} or more "
        f"(asked for: {summary.k}; ties beyond: {summary.ties})"
    )
    if summary.selected < summary.k:
        print(
            f"warning: only {summary.selected} weights moved at all; the core is all of these",
            file=sys.stderr,
        )
    elif summary.k == 0:
        print("warning: --ratio asks for less than one weight; the core is empty", file=sys.stderr)


def _labels(paths: list[str]) -> list[str]:
    """File names where they tell the tasks apart, else the paths."""
    stems = [Path(path).stem for path in paths]
    return stems if len(set(stems)) == len(stems) else paths


def _groups(args: argparse.Namespace) -> None:
    if args.difficulty is not None and len(args.difficulty) != len(args.cores):
        raise IsolationError(f"--difficulty has {len(args.difficulty)} values for {len(args.cores)} cores")
    if args.json:
        _require_file("--json", Path(args.json), overwrite=True)
        _refuse_source("--json", Path(args.json), [Path(one) for one in args.cores if Path(one).exists()])
    cores, labels = [CoreFile(path) for path in args.cores], _labels(args.cores)
    counts = intersections(cores)
    similarity = similarity_of(counts)
    groups = order_groups(
        group_tasks(similarity, args.tau), args.order, seed=args.seed, cores=cores, difficulty=args.difficulty
    )
    stages = plan_stages(groups, args.frozen, single_stage=args.single_stage)
    header = ("similarity", *labels, "weights")
    rows = [
        (label, *(f"{value:.4f}" for value in line), str(counts[i][i]))
        for i, (label, line) in enumerate(zip(labels, similarity, strict=True))
    ]
    print(columns([header, *rows], rule=True))
    print(f"\n{len(groups)} groups at tau = {args.tau:g}, order: {args.order}\n")

    def named(tasks) -> str:
        return ", ".join(labels[task] for task in tasks) or "-"

    lines = [(str(i + 1), named(stage.tasks), named(stage.frozen)) for i, stage in enumerate(stages)]
    print(columns([("stage", "trains on", f"frozen ({args.frozen})"), *lines], left=(0, 1, 2), rule=True))
    if args.json:
        record = {
            "cores": args.cores,
            "sizes": [counts[i][i] for i in range(len(cores))],
            "similarity": similarity,
            "tau": args.tau,
            "order": args.order,
            "groups": groups,
            "frozen": args.frozen,
            "stages": [{"tasks": list(stage.tasks), "frozen": list(stage.frozen)} for stage in stages],
        }
        write_whole(Path(args.json), json.dumps(record, indent=1) + "\n")


def _fuse(args: argparse.Namespace) -> None:
    for path, core in zip(args.tuned, args.core):
        tuned, measured = os.path.basename(os.path.normpath(path)), CoreFile(core).metadata.get("tuned", "")
        if measured and measured != tuned:
            print(f"note: {core} was taken from {measured!r} and is used for {tuned!r}", file=sys.stderr)
    passes = 2 if args.method == "slerp" else 1
    with _bar("fuse", passes * _elements(args.base), args.quiet) as advance:
        report = fuse_checkpoints(
            args.base,
            args.tuned,
            args.core,
            args.out,
            method=args.method,
            omega=args.omega,
            eps=args.eps,
            max_shard_bytes=args.max_shard_size,
            advance=advance,
        )
    folds = f"{report.slerp} tensors blended on the sphere, {report.linear} linearly (counted once a task)"
    share = 100 * report.core_elements / max(1, report.elements)
    print(
        f"fused: {report.core_elements} of {report.elements} weights from cores ({share:.3g} %), {folds}\n{args.out}"
    )
