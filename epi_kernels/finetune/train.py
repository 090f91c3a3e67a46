"""One training run: the loop, its losses, its log and its checkpoints."""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from . import checkpoint
from .chat import IGNORE, Encoded
from .errors import UserError
from .log import Log
from .model import weights_fingerprint
from .options import Options
from .packing import Schedule, collate


@dataclass
class Rows:
    """Packed rows of one data set."""

    examples: Sequence[Encoded]
    rows: list[list[int]]

    def batch(
        self, indices: Sequence[int], pad_id: int, packing: bool, device: str, attention: str
    ) -> dict[str, torch.Tensor]:
        rows = [[self.examples[i] for i in self.rows[row]] for row in indices]
        return collate(rows, pad_id, packing, device, attention)


@dataclass
class Job:
    """Everything a run needs that does not change during it."""

    options: Options
    tokenizer: Any
    train: Rows
    validation: Rows | None
    retain: Rows | None
    schedule: Schedule
    steps: int
    pad_id: int
    device: str
    fingerprints: dict[str, str] = field(default_factory=dict)

    def batch(self, rows: Rows, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        return rows.batch(indices, self.pad_id, self.options.packing, self.device, self.options.attention)

    @property
    def eval_every(self) -> int:
        return self.options.eval_every or max(1, self.steps // 10)


class Interrupts:
    """While active, the first SIGINT or SIGTERM only sets `signal`; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def _handle(self, number, frame) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        print("\nfinishing the step and saving; once more to stop at once", file=sys.stderr)

    def __enter__(self) -> Interrupts:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        except ValueError:
            pass  # not the main thread: signals are someone else's
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def answer_loss(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """(summed cross-entropy in nats, number of answer tokens), logits in float32 at the answers alone."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    learned = labels != IGNORE
    return F.cross_entropy(logits[learned].float(), labels[learned], reduction="sum"), int(learned.sum())


@torch.no_grad()
def evaluate(model, rows: Rows | None, job: Job) -> float | None:
    """Mean nats an answer token; None without data."""
    if rows is None:
        return None
    model.eval()
    total, tokens = 0.0, 0
    size = job.options.batch_size
    for start in range(0, len(rows.rows), size):
        indices = range(start, min(start + size, len(rows.rows)))
        loss, count = answer_loss(model, job.batch(rows, indices))
        total, tokens = total + float(loss), tokens + count
    model.train()
    return total / max(1, tokens)


def peak_memory_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def step_seed(seed: int, step: int) -> int:
    """Seeds dropout of one step: a resumed run needs no saved generator, and `--compare` drops the same units."""
    return (seed * 1_000_003 + step * 7_919 + 17) % (1 << 63)


@dataclass
class Outcome:
    """How a run ended. `signal` is set when it was interrupted (and saved)."""

    step: int
    validation_loss: float | None = None
    retain_before: float | None = None
    retain_after: float | None = None
    signal: int | None = None


class Run:
    """A run in `directory`: an optimizer and a schedule over a model, for the steps of a job."""

    def __init__(self, job: Job, directory: Path, model, optimizer, scheduler, log: Log, label: str):
        self.job, self.directory, self.model, self.label = job, directory, model, label
        self.optimizer, self.scheduler, self.log = optimizer, scheduler, log
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.saved_step: int | None = None
        self.reported: object = None
        self.carried: dict = {}  # what later log lines and resumes need of earlier ones

    def log_refresh(self, step: int) -> None:
        """Logs the last refresh unless it is logged already (or the optimizer never refreshes)."""
        read: Callable | None = getattr(self.optimizer, "isolation_report", None)
        report = read() if read is not None else None
        if report is None or report is self.reported:
            return
        self.reported = report
        fields = {**report.as_dict(), "step": step}
        self.log.write("refresh", **fields, state_bytes=self.optimizer.state_bytes())

    def eval(self, step: int) -> None:
        begin = time.perf_counter()
        validation = evaluate(self.model, self.job.validation, self.job)
        retain = evaluate(self.model, self.job.retain, self.job)
        self.log.write(
            "eval",
            step=step,
            validation_loss=validation,
            retain_loss=retain,
            seconds=round(time.perf_counter() - begin, 4),
        )
        if not self.job.options.quiet:
            known = [("validation loss", validation), ("old-data loss", retain)]
            text = ", ".join(f"{name} {value:.4f}" for name, value in known if value is not None)
            tqdm.write(f"{self.label}: step {step} of {self.job.steps}" + (f", {text}" if text else ""))
        self.carried["validation"] = validation
        self.carried.setdefault("retain_before", retain)
        self.carried["retain_after"] = retain

    def save(self, step: int, final: bool = False) -> bool:
        """Saves step's checkpoint; on a full disk says so and returns False, the earlier ones untouched."""
        if self.saved_step == step:
            return True
        try:
            target = self.directory / "checkpoints" / f"{checkpoint.PREFIX}{step:08d}"
            self.log.write("checkpoint", step=step, path=str(target.relative_to(self.directory)))
            state = {
                "log_bytes": self.log.flush(sync=True),
                "weights": weights_fingerprint(self.model),
                "carried": self.carried,
                "steps": self.job.steps,
                "fingerprints": self.job.fingerprints,
            }
            checkpoint.save_checkpoint(
                self.directory,
                step,
                self.model,
                self.job.tokenizer,
                self.optimizer,
                self.scheduler,
                state,
                self.job.options.keep_checkpoints,
            )
        except (checkpoint.DiskFull, OSError) as error:
            if isinstance(error, OSError) and not checkpoint.is_disk_full(error, self.directory):
                raise
            kept = (
                f"the checkpoint of step {self.saved_step} is whole"
                if self.saved_step is not None
                else "there is no earlier checkpoint"
            )
            after = "" if final else "; the run goes on and tries again at the next one"
            self.log.write("checkpoint_failed", step=step, reason=str(error))
            print(f"\ncheckpoint of step {step} not written: {error}; {kept}{after}", file=sys.stderr)
            return False
        self.saved_step = step
        return True

    def step(self, index: int) -> dict:
        """One optimizer step over all micro-batches of step `index`; the loss is a mean over all their answer tokens."""
        job, options = self.job, self.job.options
        torch.manual_seed(step_seed(options.seed, index))
        batches = [job.batch(job.train, rows) for rows in job.schedule.micro_batches(index)]
        answers = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            loss, _ = answer_loss(self.model, batch)
            (loss / answers).backward()
            total += float(loss.detach())
        limit = options.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        loss = total / answers
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"step {index + 1}: loss {loss}, gradient norm {norm}; the weights of step {index} are untouched. "
                f"Last checkpoint: {'none' if self.saved_step is None else f'step {self.saved_step}'}. A smaller --lr or --dtype fp32 may help",
                status=1,
            )
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        return {"loss": loss, "lr": float(lr), "grad_norm": norm, "tokens": tokens, "answer_tokens": answers}

    def run(self, start: int) -> Outcome:
        """Steps `start` .. steps. Returns early, with a checkpoint, when interrupted."""
        job, options = self.job, self.job.options
        if start == 0:
            self.log_refresh(0)
            self.eval(0)
        quiet = options.quiet or not sys.stderr.isatty()
        with (
            Interrupts() as interrupts,
            tqdm(total=job.steps, initial=start, desc=self.label, unit="step", disable=quiet) as bar,
        ):
            for index in range(start, job.steps):
                begin = time.perf_counter()
                fields = self.step(index)
                done = index + 1
                if done % options.log_every == 0 or done == job.steps:
                    epoch = done / job.schedule.steps_per_epoch
                    self.log.write(
                        "step",
                        step=done,
                        epoch=round(epoch, 4),
                        **fields,
                        seconds=round(time.perf_counter() - begin, 4),
                    )
                self.log_refresh(done)
                bar.set_postfix(loss=f"{fields['loss']:.4f}", refresh=False)
                bar.update()
                if done % job.eval_every == 0 or done == job.steps:
                    self.eval(done)
                stop = interrupts.signal is not None  # read once: a signal may come at any time
                if done == job.steps or stop:
                    if not self.save(done, final=True):
                        raise UserError("free some space, then continue with --resume", status=1)
                elif done % options.checkpoint_every == 0:
                    self.save(done)
                if stop:
                    break
        return Outcome(
            self.saved_step or 0,
            self.carried.get("validation"),
            self.carried.get("retain_before"),
            self.carried.get("retain_after"),
            interrupts.signal,
        )
