"""One optimizer's run, fresh or resumed: everything around the loop, from weights to a directory that loads."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from epi_kernels.files import write_whole
from epi_kernels.integrations import named_parameter_groups
from epi_kernels.isolation.consolidated import freeze, require_cores_of
from epi_kernels.isolation.core_file import CoreFile
from epi_kernels.training import state_bytes

from . import checkpoint, model, packing, plan, protect
from .build import build_optimizer, build_scheduler, environment
from .errors import UserError
from .log import Log
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
    """One optimizer's run, fresh or resumed, from model to exported directory."""
    job, options = prepared.job, prepared.job.options
    _deterministic(job.device)
    net = model.load_model(
        options.model, prepared.config, dtype, options.attention, job.device, options.seed, job.tokenizer
    )
    fingerprint = model.weights_fingerprint(net)
    if saved is not None or label == "adamw":
        begun = (saved or read_run(options.out))["model_weights"]
        refuse_changes("model", {"the model": begun}, {"the model": fingerprint})
    source, cores = None, []
    if label == "isolation" and not (saved is not None and checkpoint.list_checkpoints(directory)):
        source, cores = load_protected(options, net), load_frozen(options, net)
    if options.packing:
        packing.assert_no_leak(net, job.tokenizer.vocab_size, options.attention)
    if options.gradient_checkpointing:
        model.enable_checkpointing(net)
    optimizer = build_optimizer(
        options, named_parameter_groups(net, weight_decay=options.weight_decay), label
    )
    if source is not None:
        _carry(optimizer, source)
    frozen = freeze(optimizer, cores) if cores else 0
    if cores:
        print(f"frozen for good: {frozen} weights of {len(cores)} core regions")

    # Everything that can be refused has been: from here on the disk is written to.
    if saved is None and label == "isolation":
        _begin(options, job.fingerprints, fingerprint)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint.clean(directory)
    found = checkpoint.list_checkpoints(directory) if saved is not None else []
    start, carried = 0, {}
    if found:
        del net, optimizer  # before their successors are loaded: two models need not fit
        try:
            state = checkpoint.load_state(found[-1])
            net = _load_weights(found[-1], options, job.device, dtype, state["weights"])
            both = checkpoint.load_optimizer(found[-1])
            # The weights are in new tensors now: the optimizer is built anew over them.
            optimizer = build_optimizer(
                options, named_parameter_groups(net, weight_decay=options.weight_decay), label
            )
            scheduler = build_scheduler(options, optimizer, job.steps)
            _load_optimizer(optimizer, both["optimizer"], found[-1])
            scheduler.load_state_dict(both["scheduler"])
        except UserError as error:
            advice = f"if it is damaged, remove {found[-1]} to resume from the checkpoint before it"
            raise UserError(f"cannot resume from the last checkpoint: {error}; {advice}", 1) from None
        start, carried = state["step"], state["carried"]
        # A kill may have come before it; only now is the last one known to be sound.
        checkpoint.prune(directory, options.keep_checkpoints)
        log = Log(directory / "log.jsonl", keep_bytes=state["log_bytes"])
        log.write("resume", step=start, environment=environment(job.device), time=time.time())
        _warn_other_environment(saved, job.device)
        print(f"{label}: continues after step {start} of {job.steps}")
    else:
        scheduler = build_scheduler(options, optimizer, job.steps)
        log = Log(directory / "log.jsonl", keep_bytes=0)
        _log_start(log, prepared, net, memory, label)
        if source is not None:
            _log_protect(log, source, fingerprint, optimizer)
        if cores:
            log.write("freeze", step=0, cores=[core.label for core in cores], frozen=frozen)
    one = Run(job, directory, net, optimizer, scheduler, log, label)
    one.saved_step, one.carried = (start if found else None), carried
    outcome = one.run(start)
    if outcome.step == job.steps:
        _finish(one, outcome)
    return outcome


def _deterministic(device: str) -> None:
    """On a GPU some backward passes add in any order; bit-for-bit resumes need the ordered ones."""
    if device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def _begin(options: Options, fingerprints: dict, model_weights: str) -> None:
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror})") from None
    if options.overwrite:
        # What it holds: `out` itself may be a link, or a mount. Its mark last: cut short, it can be done again.
        for path in sorted(out.iterdir(), key=lambda path: path.name == "run.json"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    record = {
        "version": RUN_VERSION,
        "options": options.saved(),
        "fingerprints": fingerprints,
        "model_weights": model_weights,
        "environment": environment(model.pick_device(options.device)),
    }
    _write_json(out / "run.json", record)


def load_protected(options: Options, net: torch.nn.Module) -> protect.Source | None:
    """What --protect names, checked against this model's names and shapes (it may lie on the meta device)."""
    if not options.protect:
        return None
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    betas, own = (options.beta1, options.beta2), options.importance_beta not in (None, options.beta2)
    return protect.load(options.protect, shapes, betas, options.protect_steps, own)


def load_frozen(options: Options, net: torch.nn.Module) -> list[CoreFile]:
    """What --freeze names, checked as load_protected does."""
    cores = [CoreFile(path) for path in options.freeze or ()]
    if cores:
        shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
        require_cores_of(cores, shapes)
    return cores


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


def _load_weights(folder: Path, options: Options, device: str, dtype: torch.dtype, expected: str):
    """The checkpoint's model, verified to the bit."""
    net = model.load_model(
        str(folder), model.load_config(str(folder)), dtype, options.attention, device, options.seed
    )
    if options.gradient_checkpointing:
        model.enable_checkpointing(net)
    if model.weights_fingerprint(net) != expected:
        raise UserError("the weights are not those that were saved")
    return net


def _load_optimizer(optimizer, state_dict: dict, folder: Path) -> None:
    try:
        optimizer.load_state_dict(state_dict)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / 'optimizer.pt'}: the optimizer refuses it ({error})") from None


def _warn_other_environment(saved: dict | None, device: str) -> None:
    before, now = (saved or {}).get("environment", {}), environment(device)
    changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        print(f"warning: {', '.join(changed)}: the run goes on, but maybe not bit for bit", file=sys.stderr)


def _log_start(log: Log, prepared: Prepared, net, memory: plan.Memory, label: str) -> None:
    job = prepared.job
    log.write(
        "start", step=0, time=time.time(), optimizer=label, options=job.options.saved(), environment=environment(job.device),
        parameters=net.num_parameters(), dtype=str(net.dtype).removeprefix("torch."), steps=job.steps,
        steps_per_epoch=job.schedule.steps_per_epoch, rows=job.schedule.rows, memory=memory.fields(),
        refreshes_due=plan.refreshes(job.options, job.steps) if label == "isolation" else [],
        data={name: vars(counts) for name, counts in prepared.counts.items()},
    )  # fmt: skip


def _finish(one: Run, outcome: Outcome) -> None:
    ended = (outcome.validation_loss, outcome.retain_before, outcome.retain_after)
    losses = dict(zip(LOSSES, ended, strict=True))
    bytes_ = state_bytes(one.optimizer)
    one.log.write(
        "end",
        step=outcome.step,
        **losses,
        state_bytes=bytes_,
        peak_memory_bytes=peak_memory_bytes(one.job.device),
        time=time.time(),
    )
    checkpoint.export(one.directory / "checkpoints" / f"{checkpoint.PREFIX}{outcome.step:08d}", one.directory)
    done = {"step": outcome.step, **losses, "state_bytes": bytes_}
    _write_json(one.directory / "done.json", done)
