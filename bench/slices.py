"""Long runs in slices: what is done is kept, and what was begun and did not end is tried once more, then given up.

The machine may be taken away at any moment, or a slice may take the whole run with it (the host's memory, a kernel that
hangs): that must cost its own row, and neither the others nor every call from then on.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epi_kernels.files import write_whole

ATTEMPTS = 2
PATIENCE = 4.0  # times the guess: what a slice may take where no limit says less


@dataclass(frozen=True)
class Slice:
    """``seconds``: what it takes, guessed; what a limit leaves must hold it.

    ``run``: is given the seconds it may take, and raises subprocess.TimeoutExpired where it was stopped for them.
    """

    name: str
    seconds: float
    run: Callable[[float], dict[str, Any]]


class Kept:
    """A file beside the results. ``done``: results by name. ``started``: of what is not done, how each attempt ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        saved = json.loads(path.read_text()) if path.exists() else {}
        self.done: dict[str, dict[str, Any]] = saved.get("done", {})
        self.started: dict[str, list[str]] = saved.get("started", {})

    def finish(self, name: str, result: dict[str, Any]) -> None:
        self.done[name] = result
        self.end_attempts(name, [])

    def forget(self, name: str) -> None:
        """The next call runs it anew."""
        del self.done[name]
        self.end_attempts(name, [])

    def end_attempts(self, name: str, ends: Sequence[str]) -> None:
        self.started[name] = list(ends)
        if not ends:
            del self.started[name]
        write_whole(self.path, json.dumps({"done": self.done, "started": self.started}))


def allowed(piece: Slice, left: float | None) -> float:
    """Seconds a slice may take. At least its guess: the first of a call runs however little the limit leaves."""
    most = PATIENCE * piece.seconds
    return most if left is None else min(most, max(left, piece.seconds))


def run_slices(
    slices: Sequence[Slice], kept: Kept, limit: float | None, describe: Callable[[dict[str, Any]], str]
) -> int:
    """Runs what is not done yet; how many are left. ``limit`` in seconds. ``describe``: a result in a line."""
    begun, ran = time.monotonic(), 0
    for number, piece in enumerate(slices, 1):
        while piece.name not in kept.done:
            left = None if limit is None else limit - (time.monotonic() - begun)
            given_up = len(kept.started.get(piece.name, [])) >= ATTEMPTS
            if left is not None and not given_up and (left <= 0 or (ran and left < piece.seconds)):
                return sum(piece.name not in kept.done for piece in slices)
            print(f"[{number}/{len(slices)}] {piece.name} ...", flush=True)
            if given_up:
                ends = "; ".join(kept.started[piece.name])
                kept.finish(piece.name, {"error": f"begun {ATTEMPTS} times and never finished: {ends}"})
            else:
                _attempt(piece, kept, allowed(piece, left))
                ran += 1
            if piece.name in kept.done:
                result = kept.done[piece.name]
                print(f"    {describe(result)}  ({result.get('seconds', 0)} s)", flush=True)
            else:
                print(f"    {kept.started[piece.name][-1]}", flush=True)
    return sum(piece.name not in kept.done for piece in slices)


def _attempt(piece: Slice, kept: Kept, seconds: float) -> None:
    """One more try: a result, or how it ended."""
    before, start = list(kept.started.get(piece.name, [])), time.monotonic()
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    # what stands there if nobody lives to write more
    kept.end_attempts(piece.name, [*before, f"begun {now}, ended with its process"])
    try:
        result = piece.run(seconds)
    except subprocess.TimeoutExpired as error:
        kept.end_attempts(piece.name, [*before, f"stopped after {error.timeout:.0f} s"])
        return
    except Exception as error:
        result = {
            "error": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc()[-4000:],
        }
    except BaseException:  # Ctrl-C says nothing about the slice
        kept.end_attempts(piece.name, before)
        raise
    kept.finish(piece.name, {**result, "seconds": round(time.monotonic() - start, 1)})
