"""The run's log: JSON lines, one event each, that survives kills, resumes and a full disk.

Every line has `event` and, where it belongs to a step, `step` (steps done). Losses are nats an answer token.

    start       time, environment {versions, device, ranks, fsdp}, model, data, parameters, steps, options, versions, memory (bytes; see plan.py),
                refreshes_due [steps] (with --adaptive-interval only those known), train/validation/retain counts
    protect     source, kind, steps, warnings
    freeze      cores [paths], frozen (elements of their union)
    step        epoch, loss, lr, grad_norm, tokens, answer_tokens, seconds
    refresh     threshold, ratio, interval, jaccard, isolated, entered, released, ties, nonfinite, layers [rows], state_bytes {...}
    eval        validation_loss, retain_loss (null where there is no such data), seconds
    checkpoint  path (checkpoint_failed: reason)
    resume      from step, environment
    end         validation_loss, retain_loss_before, retain_loss_after, state_bytes, peak_memory_bytes
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epi_kernels.curves import isolation_scalars

from . import trackers

if TYPE_CHECKING:
    from .job import Job


def _plain(value):
    """JSON has no inf or nan: they become the strings "inf", "-inf", "nan"; tensors and enums become numbers and text."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def scalars(event: Mapping[str, Any]) -> dict[str, float]:
    """What of an event makes a curve, by the names it has in TensorBoard and W&B; {} of one that belongs to no curve."""
    kind = event["event"]
    if kind == "refresh":
        return isolation_scalars(event)
    named = {
        "step": {name: f"train/{name}" for name in ("loss", "lr", "grad_norm", "epoch")},
        "eval": {name: f"eval/{name}" for name in ("validation_loss", "retain_loss")},
    }.get(kind, {})
    return {tag: event[name] for name, tag in named.items() if event[name] is not None}


class Log:
    """Appends events to `path`, their scalars to trackers. A full disk does not stop a run: lines wait in memory until
    they can be written; a tracker that fails is left, and said so: the log has what it would have got.
    """

    def __init__(self, path: Path, keep_bytes: int | None = None, to: Sequence[trackers.Tracker] = ()):
        """`keep_bytes`: length at the checkpoint a run resumes from; what a killed run wrote after it is cut off."""
        self.path = path
        self.trackers = list(to)
        self.waiting: list[bytes] = []
        if keep_bytes is not None and path.exists():
            os.truncate(path, min(keep_bytes, path.stat().st_size))
        self.size = path.stat().st_size if path.exists() else 0

    def write(self, event: str, **fields) -> None:
        told = {"event": event, **fields}
        line = json.dumps(_plain(told), ensure_ascii=False, allow_nan=False) + "\n"
        self.waiting.append(line.encode())
        self.flush()
        found = scalars(told) if self.trackers else {}
        if found:
            self._track(lambda tracker: tracker.write(fields["step"], found))

    def flush(self, sync: bool = False) -> int:
        """Writes what waits; returns the file's length in bytes. With `sync` the lines are on the disk when it returns."""
        data = b"".join(self.waiting)
        try:
            with open(self.path, "ab") as file:
                # A write that failed midway left half a line: start again from the last whole one.
                file.truncate(self.size)
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        except OSError:
            if sync:
                raise
            return self.size
        self.size += len(data)
        self.waiting.clear()
        if sync:
            self._track(lambda tracker: tracker.flush())
        return self.size

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind, *_) -> None:
        self._track(lambda tracker: tracker.close(failed=kind is not None))

    def _track(self, act: Callable[[trackers.Tracker], None]) -> None:
        for tracker in tuple(self.trackers):
            try:
                act(tracker)
            except Exception as error:  # of a full disk, a network, a service: none is worth a run
                self.trackers.remove(tracker)
                print(f"\n{tracker.name} gets no more of this run: {error}", file=sys.stderr)


class NoLog(Log):
    """What the ranks write to that write nothing."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull))

    def write(self, event: str, **fields) -> None:
        pass

    def flush(self, sync: bool = False) -> int:
        return 0


def open_log(job: Job, directory: Path, label: str, keep_bytes: int, first: int) -> Log:
    """The log of the run in `directory`, on the rank that writes. `first`: the first step that is not in it yet."""
    if not job.ranks.first:
        return NoLog()
    options = job.options
    made = trackers.opened(options.log_to, directory, first, label, options.saved())
    return Log(directory / "log.jsonl", keep_bytes, made)


def read(path: str | os.PathLike[str]) -> list[dict]:
    """All events of a log; a last line that a kill cut short is left out.

    Raises ValueError naming the first damaged line, or when it is not the log of a run.
    """
    whole = Path(path).read_bytes().split(b"\n")[:-1]  # lines that were ended
    events = []
    for number, line in enumerate(whole, 1):
        try:
            event = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a line of a log ({error})") from None
        if not isinstance(event, dict) or "event" not in event:
            raise ValueError(f"{path}:{number}: not a line of a log (no event)")
        events.append(event)
    if not events or events[0]["event"] != "start":
        raise ValueError(f"{path}: not the log of a fine-tuning run (its first line must be the start)")
    return events
