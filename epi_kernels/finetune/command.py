"""`epi-kernels finetune`: supervised fine-tuning with protected weights, from arguments to a directory that loads."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import torch

from . import checkpoint, compare, model, plan
from .arguments import add_arguments
from .build import check_optimizer
from .errors import UserError
from .options import Options, check_out
from .prepare import prepare
from .single import load_frozen, load_protected, one_run, read_done, read_run, refuse_changes

__all__ = ["add_arguments", "run"]


def run(args) -> int:
    """Exit status: 0 done, 1 the run failed, 2 something given is wrong, 130 or 143 interrupted and saved."""
    try:
        return _run(args)
    except (UserError, checkpoint.DiskFull) as error:
        print(f"epi-kernels finetune: {error}", file=sys.stderr)
        return getattr(error, "status", 1)
    except OSError as error:
        if not checkpoint.is_disk_full(error, Path(getattr(args, "out", "."))):
            raise
        print(f"epi-kernels finetune: {error}; free some space, then continue with --resume", file=sys.stderr)
        return 1


def _run(args) -> int:
    model.quiet_libraries()
    if getattr(args, "resume", False):
        saved = read_run(getattr(args, "out", None))
        options = Options.from_args(args, saved["options"])
    else:
        saved = None
        options = Options.from_args(args)
        check_out(options)
    prepared = prepare(options)
    job = prepared.job
    for note in prepared.notes:
        print(note)
    for name, counts in prepared.counts.items():
        print(f"{name}: {counts}")
    dtype = model.model_dtype(prepared.config, options.dtype, options.model)
    if saved is not None:
        refuse_changes("data", saved["fingerprints"], job.fingerprints)
    check_optimizer(options, dtype, job.device)
    empty = model.empty_model(prepared.config)
    memory = plan.memory(empty.parameters(), dtype, options)
    if options.dry_run and saved is None:
        load_protected(options, empty)  # as the run will: what it refuses, this refuses
        load_frozen(options, empty)
    print(plan.describe_steps(options, job.steps, job.schedule.steps_per_epoch, job.schedule.rows))
    if options.compare and dtype == torch.bfloat16 and options.stochastic_rounding is not False:
        print("note: torch.optim.AdamW rounds bf16 weights to nearest, this run's optimizer stochastically")
    if options.dry_run:
        print(plan.describe_memory(memory))
    caution = plan.warning(options, job.steps)
    if caution:
        print(f"warning: {caution}", file=sys.stderr)
    if options.dry_run:
        return 0

    out = Path(options.out)
    labels = ("isolation", "adamw") if options.compare else ("isolation",)
    for label in labels:
        directory = out if label == "isolation" else out / label
        if saved is not None and read_done(directory) is not None:
            continue
        known = saved if label == "isolation" or directory.exists() else None
        outcome = one_run(prepared, dtype, memory, directory, label, known)
        if outcome.signal is not None and (outcome.step < job.steps or label != labels[-1]):
            resume = f"epi-kernels finetune --out {shlex.quote(str(out))} --resume"
            print(f"interrupted after step {outcome.step} of {job.steps}, saved. Continue with:\n  {resume}")
            return 128 + outcome.signal
    _report_end(out, labels)
    return 0


def _report_end(out: Path, labels: tuple[str, ...]) -> None:
    results = {}
    for label in labels:
        folder = out if label == "isolation" else out / label
        results[label] = read_done(folder)
    print(compare.table(results))
    print(f"model and tokenizer: {out}\nas a page: epi-kernels report {shlex.quote(str(out))}")
