"""One training run: the loop, its losses, its log and its checkpoints."""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from epi_kernels.distributed.shards import is_sharded
from epi_kernels.training import state_bytes

from . import checkpoint
from .chat import IGNORE
from .errors import UserError
from .fsdp import whole_state, whole_weights
from .job import Job, answer_loss, evaluate
from .log import Log
from .model import weights_fingerprint


class Interrupts:
    """While active, the first SIGINT or SIGTERM only sets `signal`; a second one interrupts at once.

    With `patient`, no number of them does: a launcher passes on what its ranks have had already, and kills in the end.
    """

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def _handle(self, number, frame) -> None:
        if self.signal is not None:
            if self.patient:
                return
            raise KeyboardInterrupt
        self.signal = number
        advice = "" if self.patient else "; once more to stop at once"
        print(f"\nfinishing the step and saving{advice}", file=sys.stderr)

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


def peak_memory_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seeds dropout of one step: a resumed run needs no saved generator, and `--compare` drops the same units."""
    return (seed * 1_000_003 + step * 7_919 + 17 + rank * 15_485_863_001) % (1 << 63)


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
        self.log.write("refresh", **fields, state_bytes=self.state_bytes())

    def state_bytes(self) -> dict[str, int]:
        """Of the optimizer's state, by kind; of all ranks where each has its part. A call of all ranks."""
        found = state_bytes(self.optimizer)
        if not self.job.sharded:
            return found
        summed = self.job.ranks.sums(list(found.values()))
        return {kind: int(count) for kind, count in zip(found, summed, strict=True)}

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
        """Saves step's checkpoint; on a full disk says so and returns False, the earlier ones untouched.

        A call of all ranks: what is sharded is gathered on rank 0, which writes. Raises UserError when their weights
        are no longer the same.
        """
        if self.saved_step == step:
            return True
        ranks = self.job.ranks
        weights = whole_weights(self.model, ranks) if self.job.sharded else None
        optimizer = whole_state(self.optimizer, ranks)
        fingerprint = ""
        if ranks.first or not self.job.sharded:
            fingerprint = weights_fingerprint(self.model, weights)
        if not self.job.sharded:
            ranks.refuse_differences(
                {"weights": fingerprint},
                f"after step {step} they are no longer those of one run; its last checkpoint: {self._last_saved()}",
            )
        if not ranks.first_does(self._write, step, weights, optimizer, fingerprint, final):
            return False
        self.saved_step = step
        return True

    def _last_saved(self) -> str:
        return "none" if self.saved_step is None else f"step {self.saved_step}"

    def _write(self, step: int, weights: dict | None, optimizer: dict, fingerprint: str, final: bool) -> bool:
        try:
            target = self.directory / "checkpoints" / f"{checkpoint.PREFIX}{step:08d}"
            self.log.write("checkpoint", step=step, path=str(target.relative_to(self.directory)))
            state = {
                "log_bytes": self.log.flush(sync=True),
                "weights": fingerprint,
                "carried": self.carried,
                "steps": self.job.steps,
                "fingerprints": self.job.fingerprints,
            }
            checkpoint.save_checkpoint(
                self.directory,
                step,
                self.model,
                self.job.tokenizer,
                optimizer,
                self.scheduler.state_dict(),
                state,
                self.job.options.keep_checkpoints,
                weights,
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
            if step == self.job.steps and checkpoint.export_model(
                self.model, self.job.tokenizer, self.directory, weights
            ):
                after = f"; the trained model is in {self.directory} all the same"
            self.log.write("checkpoint_failed", step=step, reason=str(error))
            print(f"\ncheckpoint of step {step} not written: {error}; {kept}{after}", file=sys.stderr)
            return False
        return True

    def step(self, index: int) -> dict:
        """One optimizer step over all micro-batches of step `index`; the loss is a mean over all their answer tokens.

        On several ranks too: of all ranks' tokens, so that their gradients' sum is one process's gradient.
        """
        job, options, ranks = self.job, self.job.options, self.job.ranks
        torch.manual_seed(step_seed(options.seed, index, ranks.rank))
        batches = job.micro_batches(index)
        learned = [int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches]
        seen = sum(batch["input_ids"].numel() for batch, count in zip(batches, learned) if count)
        answers, tokens = map(int, ranks.sums([sum(learned), seen]))
        total = 0.0
        for batch in batches:
            loss, _ = answer_loss(self.model, batch)
            total += float(loss.detach())
            if options.gradient_release and not math.isfinite(total):  # backward() steps
                raise self._diverged(index, total / answers, None)
            (loss / answers).backward()
        (total,) = ranks.sums([total])
        norm = None if options.gradient_release else self._clipped()
        loss = total / answers
        if not (math.isfinite(loss) and (norm is None or math.isfinite(norm))):
            raise self._diverged(index, loss, norm)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss, "lr": float(lr), "grad_norm": norm, "tokens": tokens, "answer_tokens": answers}

    def _clipped(self) -> float:
        """The norm of all gradients before they were clipped; all ranks' are added first. A call of all of them."""
        if not self.job.sharded:  # FSDP2 has done it
            self.job.ranks.add_gradients(self.parameters)
        limit = self.job.options.max_grad_norm or math.inf
        clipped = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        return float(clipped.full_tensor() if is_sharded(clipped) else clipped)  # pyright: ignore[reportAttributeAccessIssue]

    def _diverged(self, index: int, loss: float, norm: float | None) -> UserError:
        known = "" if norm is None else f", gradient norm {norm}"
        return UserError(
            f"step {index + 1}: loss {loss}{known}; the weights of step {index} are untouched. "
            f"Last checkpoint: {self._last_saved()}. A smaller --lr or --dtype fp32 may help",
            status=1,
            shared=True,
        )

    def run(self, start: int) -> Outcome:
        """Steps `start` .. steps. Returns early, with a checkpoint, when interrupted."""
        job, options = self.job, self.job.options
        if start == 0:
            self.log_refresh(0)
            self.eval(0)
        quiet = options.quiet or not job.ranks.first or not sys.stderr.isatty()
        with (
            Interrupts(patient=job.ranks.size > 1) as interrupts,
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
                # read once: a signal may come at any time, and all ranks stop after the same step
                stop = job.ranks.highest(interrupts.signal or 0)
                if done == job.steps or stop:
                    if not self.save(done, final=True):
                        raise UserError("free some space, then continue with --resume", status=1, shared=True)
                elif done % options.checkpoint_every == 0:
                    self.save(done)
                if stop:
                    break
        return Outcome(
            self.saved_step or 0,
            self.carried.get("validation"),
            self.carried.get("retain_before"),
            self.carried.get("retain_after"),
            job.ranks.highest(interrupts.signal or 0) or None,
        )
