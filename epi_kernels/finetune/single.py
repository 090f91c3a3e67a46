"""One optimizer's run, fresh or resumed: everything around the loop, from weights to a directory that loads."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from epi_kernels import MaskedEMAAdamW, enable_gradient_release
from epi_kernels.files import write_whole
from epi_kernels.integrations import named_parameter_groups

from . import checkpoint, frozen, fsdp, model, packing, plan, protect
from .build import build_optimizer, build_scheduler, environment
from .errors import UserError
from .job import Job
from .log import Log, open_log
from .options import Options
from .prepare import Prepared
from .train import Outcome, Run, peak_memory_bytes

RUN_VERSION = 1
LOSSES = ("validation_loss", "retain_loss_before", "retain_loss_after")


def read_run(out: str | None) -> dict:
    """run.json of the run to resume."""
    if not out:
        raise UserError("--resume needs --out DIR, the run to continue")
    try:
        saved = json.loads((Path(out) / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--out {out}: no run to resume ({error})") from None
    if not isinstance(saved, dict):
        raise UserError(f"--out {out}: no run to resume (run.json is not an object)")
    if saved.get("version") != RUN_VERSION:
        raise UserError(
            f"--out {out}: written by another version of this command ({saved.get('version')!r}, this is {RUN_VERSION})"
        )
    missing = {"options", "fingerprints", "model_weights"} - saved.keys()
    if missing:
        raise UserError(f"--out {out}: no run to resume (run.json lacks {', '.join(sorted(missing))})")
    return saved


def refuse_changes(what: str, before: dict, now: dict) -> None:
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise UserError(
            f"cannot resume: {', '.join(changed)} changed since the run began; put the old {what} back, or start anew in another --out"
        )


def one_run(
    prepared: Prepared,
    dtype: torch.dtype,
    memory: plan.Memory,
    directory: Path,
    label: str,
    saved: dict | None,
) -> Outcome:
    """One optimizer's run, fresh or resumed, from model to exported directory. A call of all ranks."""
    job, options, ranks = prepared.job, prepared.job.options, prepared.job.ranks
    _deterministic(job.device)
    known = ranks.first_does(checkpoint.list_checkpoints, directory) if saved is not None else []
    net, fingerprint = ranks.together(_first_weights, prepared, dtype, label, saved)
    ranks.refuse_differences({"the model's weights": fingerprint}, "give all the same --model")
    source, cores = None, []
    if label == "isolation" and not known:
        source, cores = ranks.together(load_protected, options, net), frozen.load(options, net, ranks)
    if job.sharded:
        fsdp.shard(net, ranks, job.device)
    if options.packing:
        ranks.together(packing.assert_no_leak, net, job.tokenizer.vocab_size, options.attention)
    if options.gradient_checkpointing:
        model.enable_checkpointing(net)
    optimizer = ranks.together(_optimizer, net, options, label)
    if source is not None:
        ranks.together(_carry, optimizer, source)
    held = frozen.install(optimizer, cores, ranks)

    # Everything that can be refused has been: from here on the disk is written to.
    ranks.first_does(_begin, job, fingerprint, directory, saved is None and label == "isolation")
    start, carried = 0, {}
    if known:
        del net, optimizer  # before their successors are loaded: two models need not fit
        try:
            net, optimizer, scheduler, state = _load(job, known[-1], dtype, label)
        except UserError as error:
            advice = f"if it is damaged, remove {known[-1]} to resume from the checkpoint before it"
            text = f"cannot resume from the last checkpoint: {error}; {advice}"
            raise UserError(text, 1, shared=error.shared) from None
        start, carried = state["step"], state["carried"]
        # A kill may have come before it; only now is the last one known to be sound.
        ranks.first_does(checkpoint.prune, directory, options.keep_checkpoints)
        log = ranks.together(open_log, job, directory, label, state["log_bytes"], start + 1)
        log.write("resume", step=start, environment=environment(job), time=time.time())
        _warn_other_environment(saved, job)
        print(f"{label}: continues after step {start} of {job.steps}")
    else:
        scheduler = build_scheduler(options, optimizer, job.steps)
        log = ranks.together(open_log, job, directory, label, 0, 0)
        _log_start(log, prepared, net, memory, label)
        if source is not None:
            _log_protect(log, source, fingerprint, optimizer)
        frozen.record(log, cores, held)
    one = Run(job, directory, net, optimizer, scheduler, log, label)
    one.saved_step, one.carried = (start if known else None), carried
    with log:
        outcome = one.run(start)
        if outcome.step == job.steps:
            ranks.first_does(_finish, one, outcome, one.state_bytes())
    return outcome


def _first_weights(prepared: Prepared, dtype: torch.dtype, label: str, saved: dict | None):
    """(the model that the run begins with, its fingerprint), which must be that of a run to go on with."""
    job, options = prepared.job, prepared.job.options
    net = model.load_model(
        options.model, prepared.config, dtype, options.attention, _loads_to(job), options.seed, job.tokenizer
    )
    fingerprint = model.weights_fingerprint(net)
    if saved is not None or label == "adamw":
        begun = (saved or read_run(options.out))["model_weights"]
        refuse_changes("model", {"the model": begun}, {"the model": fingerprint})
    return net, fingerprint


def _loads_to(job: Job) -> str:
    """A model to be sharded need not fit one device."""
    return "cpu" if job.sharded else job.device


def _optimizer(net: torch.nn.Module, options: Options, label: str) -> torch.optim.Optimizer:
    optimizer = build_optimizer(
        options, named_parameter_groups(net, weight_decay=options.weight_decay), label
    )
    if options.gradient_release:
        assert isinstance(optimizer, MaskedEMAAdamW), "--compare goes without gradient release"
        enable_gradient_release(net, optimizer, accumulation_steps=options.accumulation)
    return optimizer


def _load(job: Job, folder: Path, dtype: torch.dtype, label: str):
    """(model, optimizer, schedule, state.json) of a checkpoint, whatever the number of ranks that wrote it."""
    ranks = job.ranks
    state = ranks.together(checkpoint.load_state, folder)
    net = ranks.together(_load_weights, folder, job, dtype, state["weights"])
    both = ranks.together(checkpoint.load_optimizer, folder)
    if job.sharded:
        fsdp.shard(net, ranks, job.device)
    # The weights are in new tensors now: the optimizer is built anew over them.
    optimizer = ranks.together(_optimizer, net, job.options, label)
    scheduler = build_scheduler(job.options, optimizer, job.steps)
    ranks.together(_load_optimizer, optimizer, both["optimizer"], folder, job.sharded and label == "adamw")
    scheduler.load_state_dict(both["scheduler"])
    return net, optimizer, scheduler, state


def _deterministic(device: str) -> None:
    """On a GPU some backward passes add in any order; bit-for-bit resumes need the ordered ones."""
    if device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def _begin(job: Job, model_weights: str, directory: Path, fresh: bool) -> None:
    """The directory of the run, without what a killed one left half written there."""
    if fresh:
        _begin_fresh(job, model_weights)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint.clean(directory)


def _begin_fresh(job: Job, model_weights: str) -> None:
    options, out = job.options, Path(job.options.out)
    out.mkdir(parents=True, exist_ok=True)  # the --compare run's own
    if options.overwrite:
        # What it holds: `out` itself may be a link, or a mount. Its mark last: cut short, it can be done again.
        for path in sorted(out.iterdir(), key=lambda path: path.name == "run.json"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    record = {
        "version": RUN_VERSION,
        "options": options.saved(),
        "fingerprints": job.fingerprints,
        "model_weights": model_weights,
        "environment": environment(job),
    }
    _write_json(out / "run.json", record)


def load_protected(options: Options, net: torch.nn.Module) -> protect.Source | None:
    """What --protect names, checked against this model's names and shapes (it may lie on the meta device)."""
    if not options.protect:
        return None
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    betas, own = (options.beta1, options.beta2), options.importance_beta not in (None, options.beta2)
    return protect.load(options.protect, shapes, betas, options.protect_steps, own)


def _write_json(path: Path, record: dict) -> None:
    write_whole(path, json.dumps(record, indent=1) + "\n")


def read_done(directory: Path) -> dict | None:
    """What a finished run ended with; None when it has not finished, or its done.json cannot be read."""
    try:
        done = json.loads((directory / "done.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(done, dict) and done.keys() >= {"step", *LOSSES, "state_bytes"}
    return done if whole else None


def _carry(optimizer, source: protect.Source) -> None:
    try:
        optimizer.carry_importance(source.state_dict)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"--protect {source.path}: the optimizer refuses it ({error})") from None
    source.state_dict = {}  # the optimizer has its own copy; this one may be as large as the model
    optimizer.refresh_isolation_mask()
    report = optimizer.isolation_report()
    print(f"protected from the first step: {report.isolated} weights isolated ({source.description})")
    if report.isolated == 0:
        print(
            "warning: the carried importance isolates nothing; is --isolation-ratio too small for this model?",
            file=sys.stderr,
        )


def _log_protect(log: Log, source: protect.Source, fingerprint: str, optimizer) -> None:
    other = source.weights is not None and source.weights != fingerprint
    if other:
        print(
            f"warning: {source.path} was measured at other weights than --model's (or in another dtype); importance drifts with the weights",
            file=sys.stderr,
        )
    log.write(
        "protect",
        step=0,
        source=source.path,
        kind=source.kind,
        description=source.description,
        other_weights=other,
    )


def _load_weights(folder: Path, job: Job, dtype: torch.dtype, expected: str):
    """The checkpoint's model, verified to the bit."""
    options, config = job.options, model.load_config(str(folder))
    net = model.load_model(str(folder), config, dtype, options.attention, _loads_to(job), options.seed)
    if options.gradient_checkpointing:
        model.enable_checkpointing(net)
    if model.weights_fingerprint(net) != expected:
        raise UserError("the weights are not those that were saved")
    return net


def _load_optimizer(optimizer, state_dict: dict, folder: Path, in_parts: bool) -> None:
    try:
        optimizer.load_state_dict(fsdp.laid_out(state_dict, optimizer) if in_parts else state_dict)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / 'optimizer.pt'}: the optimizer refuses it ({error})") from None


def _warn_other_environment(saved: dict | None, job: Job) -> None:
    before, now = (saved or {}).get("environment", {}), environment(job)
    before = {"ranks": 1, "fsdp": False, **before}  # what runs of one process did not say
    changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        print(f"warning: {', '.join(changed)}: the run goes on, but maybe not bit for bit", file=sys.stderr)


def _log_start(log: Log, prepared: Prepared, net, memory: plan.Memory, label: str) -> None:
    job = prepared.job
    log.write(
        "start", step=0, time=time.time(), optimizer=label, options=job.options.saved(), environment=environment(job),
        parameters=net.num_parameters(), dtype=str(net.dtype).removeprefix("torch."), steps=job.steps,
        steps_per_epoch=job.schedule.steps_per_epoch, rows=job.schedule.rows, memory=memory.fields(),
        refreshes_due=plan.refreshes(job.options, job.steps) if label == "isolation" else [],
        data={name: vars(counts) for name, counts in prepared.counts.items()},
    )  # fmt: skip


def _finish(one: Run, outcome: Outcome, bytes_: dict[str, int]) -> None:
    ended = (outcome.validation_loss, outcome.retain_before, outcome.retain_after)
    losses = dict(zip(LOSSES, ended, strict=True))
    peak = peak_memory_bytes(one.job.device)
    one.log.write(
        "end", step=outcome.step, **losses, state_bytes=bytes_, peak_memory_bytes=peak, time=time.time()
    )
    checkpoint.export(one.directory / "checkpoints" / f"{checkpoint.PREFIX}{outcome.step:08d}", one.directory)
    done = {"step": outcome.step, **losses, "state_bytes": bytes_}
    _write_json(one.directory / "done.json", done)
