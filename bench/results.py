"""Result rows: the arithmetic, what a row carries, and the files they are appended as.

bench/results/{cpu,side-by-side,quality,gpu,large}-*.json are runs: each is written once and never edited. reproduce-*.json are
bundles of the newest manifests of `epi-kernels reproduce`, and are overwritten when runs are added or made anew.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.sources import ROOT, kernel_hashes
from epi_kernels.provenance import git, machine, versions

RESULTS = ROOT / "bench" / "results"
SCHEMA = 1
PERCENTILES = (20, 50, 80)

# every row has these, whatever it measures
ROW_KEYS = (
    "schema",
    "name",
    "group",
    "dtype",
    "elements",
    "tensors",
    "options",
    "backend",
    "threads",
    "target",
    "met",
    "machine",
    "versions",
    "commit",
    "dirty",
    "date",
    "load_before",  # load average when the run began
    "complete",  # the whole plan, at the sizes the targets are for
)
# and these, where it is a timing
TIMING_KEYS = (
    "rounds",
    "beside",
    "ours_ms",
    "beside_ms",
    "ratio",
    "ns_per_element",
    "gbps",
    "copy_share",
    "preempted_per_round",
)


# ---------------------------------------------------------------- arithmetic


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile, linear between order statistics (numpy's default)."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": percentile(values, q) for q in PERCENTILES}


def paired_ratios(ours: Sequence[float], beside: Sequence[float]) -> list[float]:
    """Round by round: what slows the machine for a while slows both sides of a ratio."""
    if len(ours) != len(beside):
        raise ValueError(f"{len(ours)} timings of ours, {len(beside)} of its pair")
    return [a / b for a, b in zip(ours, beside)]


class Line(NamedTuple):
    """cost = fixed + each * size: a fixed cost a call, and one an element."""

    fixed: float
    each: float
    deviation: float  # the largest distance of a cost from the line, as a share of the cost


def line(sizes: Sequence[float], costs: Sequence[float]) -> Line:
    """Least squares of the relative distances, so that small sizes count as much as large ones."""
    # minimise sum((fixed * a + each * b - 1)^2) with a = 1 / cost, b = size / cost
    a, b = [1 / c for c in costs], [n / c for n, c in zip(sizes, costs)]
    aa, ab, bb = (sum(x * y for x, y in zip(p, q)) for p, q in ((a, a), (a, b), (b, b)))
    sa, sb = sum(a), sum(b)
    determinant = aa * bb - ab * ab
    fixed, each = (sa * bb - sb * ab) / determinant, (sb * aa - sa * ab) / determinant
    return Line(fixed, each, max(abs(fixed * x + each * y - 1) for x, y in zip(a, b)))


# ---------------------------------------------------------------- where and from what


def provenance() -> dict[str, Any]:
    """What every row of a run shares. ``dirty``: what is measured, or what measures, is not as committed."""
    changed = git(
        ROOT, "status", "--porcelain", "--", "csrc", "epi_kernels", "bench", "setup.py", ":!bench/results"
    )
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "versions": versions("torch", "numpy", "pytest-benchmark"),
        "commit": git(ROOT, "rev-parse", "--short=10", "HEAD") or "unknown",
        "dirty": bool(changed) if changed is not None else None,
        "kernels": kernel_hashes(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def unjudged(group: str, copy_gbps: float, threads: int, *, backend: str, complete: bool) -> dict[str, Any]:
    """What rows of a run without targets share."""
    return provenance() | {
        "group": group,
        "copy_gbps": copy_gbps,
        "threads": threads,
        "backend": backend,
        "options": {},
        "target": None,
        "met": None,
        "load_before": None,
        "complete": complete,
        "preempted_per_round": None,
    }


# ---------------------------------------------------------------- files


def check_row(row: dict[str, Any]) -> None:
    """Raises where a row lacks what every row must carry."""
    keys = (*ROW_KEYS, *(TIMING_KEYS if "ours_ms" in row else ()))
    missing = [key for key in keys if key not in row]
    if missing:
        raise ValueError(f"row {row.get('name')!r} lacks {', '.join(missing)}")


def machine_slug(facts: dict[str, Any]) -> str:
    text = re.sub(r"\(R\)|\(TM\)|CPU|Processor|@.*", " ", facts["cpu"])
    return f"{re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')}-{facts['cores']}-cores"


def append(rows: Sequence[dict[str, Any]], folder: Path, prefix: str = "cpu") -> Path:
    """Writes a run as a new file; a file that exists is never written to."""
    for row in rows:
        check_row(row)
    first = rows[0]
    stem = f"{prefix}-{machine_slug(first['machine'])}-{first['date'][:10]}-{first['commit']}"
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"  # a row a line
    return write_new(folder, stem, text)


def write_new(folder: Path, stem: str, text: str) -> Path:
    """STEM.json, or STEM-2.json and so on where that exists; a file that exists is never written to."""
    folder.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, 1000):
        path = folder / (f"{stem}.json" if attempt == 1 else f"{stem}-{attempt}.json")
        try:
            with open(path, "x") as file:
                file.write(text)
            return path
        except FileExistsError:
            continue
    raise FileExistsError(f"{folder} holds 999 runs named {stem}")


def write_record(record: dict[str, Any], folder: Path, stem: str, lists: Sequence[str]) -> Path:
    """A record that is one object at a new path; what ``lists`` names is written an entry a line."""
    head = json.dumps({key: value for key, value in record.items() if key not in lists}, indent=1)
    tail = [f'"{key}": [\n' + ",\n".join(json.dumps(line) for line in record[key]) + "\n]" for key in lists]
    return write_new(folder, stem, ",\n".join([head.removesuffix("\n}"), *tail]) + "\n}\n")


def record_rows(found: dict[str, Any], prefix: str) -> None:
    """Writes a record with ``rows`` as PREFIX-DATE-COMMIT.json under bench/results, and says so."""
    path = write_record(found, RESULTS, f"{prefix}-{found['date'][:10]}-{found['commit']}", ("rows",))
    print(f"{path.relative_to(ROOT)}: written; `make tables` puts it into the README", file=sys.stderr)


def newest_record(folder: Path, prefix: str) -> dict[str, Any] | None:
    """Of the files that write_record made."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{prefix}-*.json"))]
    for record in records:
        if record["schema"] != SCHEMA:
            raise ValueError(f"a {prefix} file of schema {record['schema']}, this reads {SCHEMA}")
    return max(records, key=lambda record: record["date"], default=None)


# A refresh reads only, which may be faster than a copy, but not by more.
READS_OVER_COPY = 2.0


def is_noise(row: dict[str, Any]) -> bool:
    """What a refresh adds to a step is a difference of two steps: less than memory takes is their noise."""
    if not row["name"].endswith("-after-step") or "copy_share" not in row:
        return False
    return row["copy_share"] is None or not 0 < row["copy_share"] <= READS_OVER_COPY


def load(path: Path) -> list[dict[str, Any]]:
    rows = json.loads(path.read_text())
    for row in rows:
        if row["schema"] != SCHEMA:
            raise ValueError(f"{path.name}: rows of schema {row['schema']}, this reads {SCHEMA}")
        check_row(row)
    return rows


def newest_complete(
    folder: Path, prefix: str = "cpu", device: str | None = None
) -> list[dict[str, Any]] | None:
    """Rows of the newest run that measured everything, at the sizes the targets are for. ``device``: on one of this type."""
    runs: Iterable[list[dict[str, Any]]] = (load(path) for path in sorted(folder.glob(f"{prefix}-*.json")))
    complete = [run for run in runs if run and all(row["complete"] for row in run)]
    if device is not None:
        complete = [run for run in complete if run[0]["device"]["type"] == device]
    return max(complete, key=lambda run: run[0]["date"], default=None)
