"""`epi-kernels report DIR`: the log of a fine-tuning run as one self-contained HTML page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from epi_kernels.finetune import log
from epi_kernels.finetune.checkpoint import is_disk_full

from . import page, sections


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="a directory that `epi-kernels finetune` wrote (--out)")
    parser.add_argument("--out", metavar="FILE.html", help="the page [DIR/report.html]")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 written, 1 the disk is full, 2 there is no log, or it cannot be read, or the page not written."""
    directory = Path(args.dir)
    out = Path(args.out) if args.out else directory / "report.html"
    try:
        runs = read_runs(directory)
        page.build(out, *sections.describe(directory.resolve().name, runs))
    except KeyError as error:
        lack = f"{directory}: its log has no {error} where the page needs it"
        print(f"epi-kernels report: {lack}; another version wrote it?", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and is_disk_full(error, out.parent):
            print(f"epi-kernels report: no space left for {out}", file=sys.stderr)
            return 1
        print(f"epi-kernels report: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


def read_runs(directory: Path) -> dict[str, list[dict]]:
    """Logs of the run in `directory` and, with --compare, of plain AdamW beside it."""
    if not (directory / "log.jsonl").is_file():
        raise ValueError(f"{directory}: no log.jsonl; DIR is the --out of `epi-kernels finetune`")
    runs = {"isolation": log.read(directory / "log.jsonl")}
    if (directory / "adamw" / "log.jsonl").is_file():
        runs["adamw"] = log.read(directory / "adamw" / "log.jsonl")
    return runs
