"""`epi-kernels finetune`: supervised fine-tuning with protected weights, from arguments to a directory that loads."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from epi_kernels.files import held

from . import checkpoint, compare, fit, frozen, model, plan
from .arguments import add_arguments
from .build import check_optimizer
from .errors import UserError
from .options import Options, check_out
from .prepare import Prepared, prepare
from .ranks import Ranks, joined
from .single import load_protected, one_run, read_done, read_run, refuse_changes

__all__ = ["add_arguments", "run"]


def run(args) -> int:
    """Exit status: 0 done, 1 the run failed, 2 something given is wrong, 130 or 143 interrupted and saved.

    Started on several ranks by torchrun or accelerate launch, it is a call of all of them.
    """
    try:
        with joined() as ranks:
            return _ended(args, ranks)
    except UserError as error:  # the launcher's environment
        print(f"epi-kernels finetune: {error}", file=sys.stderr)
        return error.status


def _ended(args, ranks: Ranks) -> int:
    try:
        with ranks.speaking():
            return _run(args, ranks)
    except (UserError, checkpoint.DiskFull) as error:
        if ranks.first or not getattr(error, "shared", False):
            print(f"epi-kernels finetune: {error}", file=sys.stderr)
        return getattr(error, "status", 1)
    except OSError as error:
        if not checkpoint.is_disk_full(error, Path(getattr(args, "out", "."))):
            raise
        print(f"epi-kernels finetune: {error}; free some space, then continue with --resume", file=sys.stderr)
        return 1


def _run(args, ranks: Ranks) -> int:
    model.quiet_libraries()
    options, saved = ranks.together(_options, args)
    prepared, dtype, memory = ranks.together(_planned, options, saved, ranks)
    job = prepared.job
    ranks.refuse_differences(job.fingerprints, "give all the same data, tokenizer and arguments")
    if options.dry_run:
        return 0

    with contextlib.ExitStack() as stack:
        ranks.first_does(stack.enter_context, _alone_in(options, saved))
        return _train(prepared, dtype, memory, saved, ranks)


@contextlib.contextmanager
def _alone_in(options: Options, saved: dict | None) -> Iterator[None]:
    """Nobody else trains in the output directory meanwhile. Raises UserError."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(Path(options.out)))
        except BlockingIOError:
            raise UserError(
                f"--out {options.out}: another process is training there; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            raise UserError(f"--out {options.out}: cannot be made ({error.strerror})") from None
        if saved is None:  # while the data were read another run may have begun and ended there
            check_out(options)
        yield


def _train(prepared: Prepared, dtype: torch.dtype, memory, saved: dict | None, ranks: Ranks) -> int:
    job, options = prepared.job, prepared.job.options
    out = Path(options.out)
    labels = ("isolation", "adamw") if options.compare else ("isolation",)
    for label in labels:
        directory = out if label == "isolation" else out / label
        begun, done = ranks.first_does(_found, directory)
        if saved is not None and done:
            continue
        known = saved if label == "isolation" or begun else None
        outcome = one_run(prepared, dtype, memory, directory, label, known)
        if outcome.signal is not None and (outcome.step < job.steps or label != labels[-1]):
            resume = f"epi-kernels finetune --out {shlex.quote(str(out))} --resume"
            how = " (on any number of ranks)" if ranks.size > 1 else ""
            print(
                f"interrupted after step {outcome.step} of {job.steps}, saved. Continue with{how}:\n  {resume}"
            )
            return 128 + outcome.signal
    if ranks.first:
        _report_end(out, labels)
    return 0


def _options(args) -> tuple[Options, dict | None]:
    """The run's options; run.json of the run to resume."""
    if getattr(args, "resume", False):
        saved = read_run(getattr(args, "out", None))
        return Options.from_args(args, saved["options"]), saved
    options = Options.from_args(args)
    check_out(options)
    return options, None


def _found(directory: Path) -> tuple[bool, bool]:
    """Whether a run has begun there, and ended."""
    return directory.exists(), read_done(directory) is not None


def _planned(options: Options, saved: dict | None, ranks: Ranks) -> tuple[Prepared, torch.dtype, plan.Memory]:
    """Everything that can be known and refused before weights are loaded; says what will be done."""
    for flag, asked in (("--fit", options.fit is not None), ("--gradient-release", options.gradient_release)):
        if asked and ranks.size > 1:
            raise UserError(f"{flag} is for one process: {ranks.size} ranks share memory out with --fsdp")
    fitting: list[str] = []
    if options.fit is not None and saved is None:  # a run that goes on has been fitted
        options, fitting = fit.fitted(options)
    prepared = prepare(options, ranks)
    job = prepared.job
    for note in fitting:
        print(note)
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
        frozen.load(options, empty, ranks)
    print(plan.describe_steps(options, job.steps, job.schedule.steps_per_epoch, job.schedule.rows))
    if ranks.size > 1:
        print(plan.describe_ranks(options, ranks.size))
    elif options.fsdp:
        print(
            "note: one process has nothing to share out with --fsdp; torchrun and accelerate launch start several"
        )
    if options.compare and dtype == torch.bfloat16 and options.stochastic_rounding is not False:
        print("note: torch.optim.AdamW rounds bf16 weights to nearest, this run's optimizer stochastically")
    if options.dry_run:
        print(plan.describe_memory(memory, options.offload))
        if job.sharded:
            print(f"all of these lie over the {ranks.size} ranks, about 1/{ranks.size} on each")
    caution = plan.warning(options, job.steps)
    if caution:
        print(f"warning: {caution}", file=sys.stderr)
    return prepared, dtype, memory


def _report_end(out: Path, labels: tuple[str, ...]) -> None:
    results = {}
    for label in labels:
        folder = out if label == "isolation" else out / label
        results[label] = read_done(folder)
    print(compare.table(results))
    print(f"model and tokenizer: {out}\nas a page: epi-kernels report {shlex.quote(str(out))}")
