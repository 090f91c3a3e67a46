"""One run of `make gpu` as one JSON object: bench/results/gpu-MACHINE-DATE-COMMIT.json.

schema, device, machine, versions, commit, dirty, kernel_hash, date, smoke, complete: where, of what
and whether whole. tests: run, failed, failures, skipped by reason, run by slice. copy_gbps: the
device's plain copy. rows: one a workload, with percentiles p20, p50, p80 of every figure.
Files are added, never edited.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench import gpu_timing, results


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def record(identity: dict[str, Any], names: list[str], done: dict[str, Any]) -> dict[str, Any]:
    finished = [name for name in names if name in done]
    tests = [done[name] for name in finished if name.startswith("tests-")]
    failures = [text for result in tests for text in result.get("failures", [result.get("error")])]
    skipped: dict[str, int] = {}
    for result in tests:
        for reason, count in result.get("skipped", {}).items():
            skipped[reason] = skipped.get(reason, 0) + count
    copy = done.get("copy", {})
    rows = [{"name": name, **done[name]} for name in finished if name.startswith("time-")]
    if "p50" in copy:
        rows = [gpu_timing.with_bandwidth(row, copy) for row in rows]
    return {
        **identity,
        "complete": len(finished) == len(names),
        "tests": {
            "run": sum(result.get("run", 0) for result in tests),
            "failed": len(failures),
            "failures": failures,
            "skipped": skipped,
            "slices": {name: done[name].get("run", 0) for name in finished if name.startswith("tests-")},
        },
        "copy_gbps": copy,
        "rows": rows,
    }


def write_new(run: dict[str, Any], out: Path | None) -> Path:
    """A new file; one that exists is never written to."""
    stem = f"gpu-{slug(run['device']['name'])}-{run['date'][:10]}-{run['commit']}" + (
        "-smoke" if run["smoke"] else ""
    )
    text = json.dumps(run, indent=1) + "\n"
    if out is None:
        return results.write_new(results.RESULTS, stem, text)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "x") as file:
        file.write(text)
    return out


def summary(run: dict[str, Any]) -> str:
    lines = [f"{run['device']['name']}, torch {run['versions'].get('torch')}, commit {run['commit']}"]
    lines.append(f"tests: {run['tests']['run']} run, {run['tests']['failed']} failed")
    if "p50" in run["copy_gbps"]:
        lines.append(f"copy: {run['copy_gbps']['p50']} GB/s, read and written")
    lines.append(f"{'':42} {'ms':>8} {'/torch':>7} {'copy':>6} {'refresh/step':>12} {'refresh MiB':>11}")
    for row in run["rows"]:
        if "ms" not in row:
            lines.append(f"{row['name'][5:]:42} {row.get('skipped') or row.get('error')}")
            continue
        above = row["refresh_peak_above_step_bytes"]
        memory = "-" if above is None else f"{above / 2**20:.2f}"
        lines.append(
            f"{row['name'][5:]:42} {row['ms']['step']['p50']:8.3f} {row['step_over_torch']['p50']:7.3f} "
            f"{row.get('copy_share', 0):6.1%} {row['refresh_over_step']['p50']:12.3f} {memory:>11}"
        )
    return "\n".join(lines)
