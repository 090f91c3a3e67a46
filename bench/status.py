"""The README's "GPU status" line, from the newest result of `make gpu`.

python -m bench.status                    prints the line
python -m bench.status --check README.md  exits 1 when the README says something else
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.results import RESULTS, ROOT
from bench.sources import kernel_hash


def newest(folder: Path = RESULTS) -> dict[str, Any] | None:
    """The newest whole run on a GPU; smoke runs and unfinished ones are none."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("gpu-*.json"))]
    real = [run for run in runs if run["complete"] and not run["smoke"] and run["device"]["type"] == "cuda"]
    return max(real, key=lambda run: run["date"], default=None)


def line(folder: Path = RESULTS, root: Path = ROOT) -> str:
    run = newest(folder)
    if run is None:
        return "**GPU status:** never run."
    where = f"{run['device']['name']}, {run['date'][:10]}, commit {run['commit']}"
    where += " with uncommitted changes" if run["dirty"] else ""
    if run["kernel_hash"] != kernel_hash(root):
        return f"**GPU status:** stale: kernels changed since the last run ({where})."
    tests = run["tests"]
    if tests["failed"]:
        return f"**GPU status:** failing: {tests['failed']} of {tests['run']} device tests ({where})."
    return f"**GPU status:** {tests['run']} device tests passed ({where})."


MEDIUM = "**Preset `medium`, one GPU:**"


def medium_line(folder: Path = RESULTS) -> str:
    """Of `make reproduce-medium`, from the bundle that a finished run leaves; a run on a CPU is none."""
    path = folder / "reproduce-medium.json"
    if not path.exists():
        return f"{MEDIUM} never run."
    from epi_kernels.repro.bundle import read_bundle  # needs more than the rest of this file
    from epi_kernels.repro.preset import load_preset
    from epi_kernels.repro.readme import provenance

    found = read_bundle(path)
    if not all(one.machine.get("gpu") for one in found.manifests.values()):
        return f"{MEDIUM} never run."
    stale = "" if found.preset == load_preset("medium") else " Stale: the preset changed since."
    return f"{MEDIUM} {provenance(found)}{stale}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.status", description=__doc__.splitlines()[0])
    parser.add_argument("--check", type=Path, metavar="README", help="exit 1 when it lacks the line")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args(argv)
    expected = line(args.results)
    print(expected)
    if args.check is None or expected in args.check.read_text().splitlines():
        return 0
    print(f"{args.check} has another GPU status line: make tables", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
