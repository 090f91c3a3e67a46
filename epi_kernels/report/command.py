"""`epi-kernels report DIR`: the log of a fine-tuning run as one self-contained HTML page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import page, sections


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="a directory that `epi-kernels finetune` wrote (--out)")
    parser.add_argument("--out", metavar="FILE.html", help="the page [DIR/report.html]")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 written, 2 there is no log or it cannot be read."""
    directory = Path(args.dir)
    try:
        runs = read_runs(directory)
        out = Path(args.out) if args.out else directory / "report.html"
        page.build(out, *sections.describe(directory.resolve().name, runs))
    except (OSError, ValueError) as error:
        print(f"epi-kernels report: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


def read_log(path: Path) -> list[dict]:
    """Events of a log; a last line that a kill cut short is left out. Raises ValueError naming a damaged line."""
    events = []
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or "event" not in event:
                raise ValueError("no event")
        except ValueError as error:
            if not line.endswith("\n"):
                break
            raise ValueError(f"{path}:{number}: not a line of a log ({error})") from None
        events.append(event)
    if not events or events[0]["event"] != "start":
        raise ValueError(f"{path}: not the log of a fine-tuning run (its first line must be the start)")
    return events


def read_runs(directory: Path) -> dict[str, list[dict]]:
    """Logs of the run in `directory` and, with --compare, of plain AdamW beside it."""
    if not (directory / "log.jsonl").is_file():
        raise ValueError(f"{directory}: no log.jsonl; DIR is the --out of `epi-kernels finetune`")
    runs = {"isolation": read_log(directory / "log.jsonl")}
    if (directory / "adamw" / "log.jsonl").is_file():
        runs["adamw"] = read_log(directory / "adamw" / "log.jsonl")
    return runs
