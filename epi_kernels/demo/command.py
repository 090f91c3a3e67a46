"""`epi-kernels demo`: why one would use the optimizer, in a few minutes on two cores, with nothing to download."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from epi_kernels.files import write_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="runs of everything, seeds 1 to N (3)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_out"),
        metavar="DIR",
        help="for index.html and results.json (demo_out)",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="worker processes of one thread each (the cores, at most 8)"
    )
    parser.add_argument("--ratio", type=float, metavar="P", help="isolation ratio p (0.2)")
    parser.add_argument("--steps-a", type=int, metavar="N", help="steps of stage A (1200)")
    parser.add_argument("--steps-b", type=int, metavar="N", help="steps of stage B (300)")
    parser.add_argument("--quick", action="store_true", help="tiny and in seconds; its numbers show nothing")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 when every seed learned task A, 1 when not or when --out could not be written, 2 for a bad argument."""
    settings = _settings(args)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a config and no weights: nothing is asked of the hub
    from epi_kernels.demo import pool, protocol, results, text
    from epi_kernels.workers import usable_cores

    arms = protocol.make_arms(settings)
    seeds = range(1, args.seeds + 1)
    total = args.seeds * (settings.steps_a + len(arms) * settings.steps_b)
    workers = min(args.threads or min(8, usable_cores()), args.seeds * len(arms))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        write_whole(args.out / ".try", "")  # before the minutes of training
        (args.out / ".try").unlink()
    except OSError as error:
        raise _refusal(f"--out {args.out}: {error.strerror}") from error

    started = time.perf_counter()
    with _progress(total) as show:
        stage_a, stage_b = pool.run_all(settings, seeds, arms, workers, show)
    timing = {
        "wall_s": time.perf_counter() - started,
        "cpu_s": sum(one.cpu_s for one in [*stage_a, *stage_b]),
        "workers": workers,
    }
    found = results.collect(settings, arms, stage_a, stage_b, timing)
    print(json.dumps(found, indent=2) if args.json else text.report(found), flush=True)
    try:  # after the results are shown: a full disk does not take them
        _write(found, args.out)
    except OSError as error:
        print(
            f"epi-kernels demo: --out {args.out}: {error.strerror}; the results above are not kept",
            file=sys.stderr,
        )
        return 1
    if not args.json:
        print(f"\nThe page: {args.out / 'index.html'}   The numbers: {args.out / 'results.json'}")
    if not found["learned"]:
        print(f"epi-kernels demo: {text.learned(found)}", file=sys.stderr)
        return 1
    return 0


def _refusal(text: str) -> SystemExit:
    """One line, and the exit status of a bad argument."""
    print(f"epi-kernels demo: {text}", file=sys.stderr)
    return SystemExit(2)


def _settings(args: argparse.Namespace) -> Any:
    """Checked before torch is loaded by a worker."""
    from epi_kernels.demo.protocol import QUICK, Settings

    for name, least in (("seeds", 1), ("threads", 1), ("steps_a", 0), ("steps_b", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise _refusal(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.ratio is not None and not 0 < args.ratio < 1:
        raise _refusal(f"--ratio {args.ratio}: must lie between 0 and 1")
    settings = replace(Settings(), **(QUICK if args.quick else {}))
    given = {name: getattr(args, name) for name in ("ratio", "steps_a", "steps_b")}
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


class _progress:
    """A bar over all training steps of all runs."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, unit="step", desc="training", file=sys.stderr, mininterval=0.5)

    def __enter__(self):
        return self._show

    def _show(self, done: int) -> None:
        self._bar.update(done - self._bar.n)

    def __exit__(self, *exception: object) -> None:
        self._bar.close()


def _write(found: dict[str, Any], out: Path) -> None:
    from epi_kernels.demo.report_page import write_page

    write_whole(out / "results.json", json.dumps(found, indent=2) + "\n")
    write_page(found, out / "index.html")
