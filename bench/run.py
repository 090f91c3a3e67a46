"""make bench: measures the CPU cases, prints which targets are met, appends one result file.

    python -m bench.run                    everything, at the sizes the targets are for
    python -m bench.run --quick            a smoke run: tiny sizes, nothing judged, nothing written
    python -m bench.run --only refresh     a part of it (copy is always measured)
    python -m bench.run --check            exit 1 when a target is missed

Timings come from pytest-benchmark, one case a pair (bench_cpu.py says how they are paired). A run
that is not the whole plan is printed, and written only where --out says.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import bench_memory, registry, results
from bench.registry import Plan, Target

CASES = Path(__file__).with_name("bench_cpu.py")
GROUPS = ("step", "refresh", "linear", "tensors", "host", "memory")
# what a refresh may need memory for: moments, a table a layer, masks that keep, states of two bytes
MEMORY_CASES = [
    ("memory-f32-minmax-global", "float32", {}),
    ("memory-f32-zscore-layer", "float32", {"normalization": "zscore", "scope": "layer"}),
    ("memory-bf16-minmax-global-hysteresis", "bfloat16", {"hysteresis": 0.1}),
]
MEMORY_TENSORS = 10
# Load average from which a run warns: a step that finds a core taken waits for the scheduler, once a
# parallel region, and torch opens one a tensor where we open one a step. Idle, the ratio is another.
BUSY = 0.5


class Plugin:
    """Hands the plan to bench_cpu.py and leaves out what --only excludes."""

    def __init__(self, plan: Plan, groups: set[str]) -> None:
        self.plan, self.groups = plan, groups | {"copy"}

    def pytest_configure(self, config: pytest.Config) -> None:
        config.bench_plan = self.plan  # type: ignore[attr-defined]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if self._group(item) in self.groups]

    @staticmethod
    def _group(item: pytest.Item) -> str:
        params = getattr(item, "callspec", None)
        cases = (
            [value for value in params.params.values() if isinstance(value, registry.Case)] if params else []
        )
        return cases[0].group if cases else "copy"


# ---------------------------------------------------------------- rows


def timing_row(benchmark: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """A row from one case of pytest-benchmark's own report."""
    facts = dict(benchmark["extra_info"])
    beside_s = facts.pop("beside_seconds")
    minus = facts.pop("minus_beside", False)
    ours_s = benchmark["stats"]["data"]
    if minus:
        ours_s = [ours - beside for ours, beside in zip(ours_s, beside_s)]
    ours_ms = results.percentiles([1e3 * s for s in ours_s])
    ns = 1e6 * ours_ms["p50"] / facts["elements"]
    row = facts | {
        "rounds": benchmark["stats"]["rounds"],
        "beside": facts.get("beside"),
        "ours_ms": ours_ms,
        "beside_ms": None if beside_s is None else results.percentiles([1e3 * s for s in beside_s]),
        "ratio": None if beside_s is None else results.percentiles(results.paired_ratios(ours_s, beside_s)),
        "ns_per_element": ns,
        "gbps": facts["bytes_per_element"] / ns if ns > 0 else None,
    }
    if facts.get("beside_bytes_per_element"):
        beside_ns = 1e6 * row["beside_ms"]["p50"] / facts["elements"]
        row["beside_gbps"] = facts["beside_bytes_per_element"] / beside_ns
    return row | shared


def fit_rows(rows: list[dict[str, Any]], like: dict[str, Any]) -> list[dict[str, Any]]:
    """The line through the costs of all sizes, a fixed cost and one an element; the largest beside a tenth."""
    found = []
    for stem, end in (("linear-step-f32-", ""), ("linear-refresh-f32-", "-stand-alone")):
        points = [r for r in rows if r["name"].startswith(stem) and r["name"].endswith(end)]
        points.sort(key=lambda row: row["elements"])
        if len(points) < 2:
            continue
        fitted = results.line([r["elements"] for r in points], [r["ours_ms"]["p50"] for r in points])
        per_element = {r["elements"]: r["ns_per_element"] for r in points}
        largest = points[-1]["elements"]
        tenth = per_element.get(largest // 10)
        base = {key: points[-1][key] for key in like if key in points[-1]}
        base |= {"ns_by_elements": {str(n): ns for n, ns in per_element.items()}}
        found.append(
            base | {"name": f"{stem}line", "line": fitted._asdict()} | {"target": registry.LINE._asdict()}
        )
        if tenth:
            found.append(
                base
                | {"name": f"{stem}cost-ratio", "cost_ratio": per_element[largest] / tenth}
                | {"target": registry.LARGEST_TO_TENTH._asdict()}
            )
    return found


def memory_rows(plan: Plan, shared: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, dtype, options in MEMORY_CASES:
        facts = bench_memory.in_subprocess(
            plan.memory_elements, MEMORY_TENSORS, dtype, options, plan.backend, plan.threads
        )
        peaks = facts["peak_mib"]
        refresh = max(peaks["step_with_refresh"], peaks["stand_alone_refresh"])
        rows.append(
            {
                "name": name,
                "group": "memory",
                "dtype": dtype,
                "elements": plan.memory_elements,
                "tensors": MEMORY_TENSORS,
                "options": options,
                "backend": facts["backend"],
                "threads": plan.threads,
                "isolated": facts["isolated"],
                "peak_mib": peaks,
                "extra_mib": {"refresh": max(0.0, refresh - peaks["step"])},
                "target": registry.REFRESH_PEAK._asdict(),
            }
            | shared
        )
    return rows


def judge(rows: list[dict[str, Any]], judged: bool) -> None:
    """Fills in ``copy_share`` and ``met``."""
    copy_gbps = next((row["gbps"] for row in rows if row["name"] == "copy"), None)
    for row in rows:
        if "gbps" in row:
            row["copy_share"] = row["gbps"] / copy_gbps if copy_gbps and row["gbps"] else None
        target = row["target"]
        told = judged and not results.is_noise(row)
        row["met"] = Target(**target).met(row) if told and target is not None else None


def measure(plan: Plan, groups: set[str], complete: bool) -> list[dict[str, Any]]:
    load = os.getloadavg()[0]
    if load > BUSY:
        print(f"the machine is busy (load {load:.1f}): figures will say little, ratios included")
    shared = results.provenance() | {"complete": complete, "load_before": round(load, 2)}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "pytest-benchmark.json"
        code = pytest.main(
            [
                *(
                    str(CASES),
                    "-q",
                    "-p",
                    "no:cacheprovider",
                    "-p",
                    "no:xdist",
                    "-o",
                    "addopts=",
                    "--tb=short",
                ),
                *("--benchmark-only", f"--benchmark-json={report}", "--benchmark-sort=fullname"),
                *("--benchmark-columns=min,median,iqr,rounds", "--benchmark-name=short"),
            ],
            plugins=[Plugin(plan, groups)],
        )
        if code != pytest.ExitCode.OK:
            raise SystemExit(int(code) or 1)
        benchmarks = json.loads(report.read_text())["benchmarks"]
    rows = [timing_row(benchmark, shared) for benchmark in benchmarks]
    rows += fit_rows(rows, dict.fromkeys(results.ROW_KEYS))
    if "memory" in groups:
        if sys.platform == "linux":
            rows += memory_rows(plan, shared)
        else:
            print("memory: not measured, /proc/self/status is Linux's")
    judge(rows, plan.judged)
    for row in rows:
        results.check_row(row)
    return rows


# ---------------------------------------------------------------- printing


def _figures(row: dict[str, Any]) -> str:
    if "line" in row:
        line = row["line"]
        return (
            f"{line['fixed']:.3f} ms + {1e6 * line['each']:.3f} ns an element, within {line['deviation']:.0%}"
        )
    if "cost_ratio" in row:
        per_element = ", ".join(f"{int(n):.0e}: {ns:.2f}" for n, ns in row["ns_by_elements"].items())
        return f"cost ratio {row['cost_ratio']:.3f}  (ns per element {per_element})"
    if "extra_mib" in row:
        return f"{row['extra_mib']['refresh']:.2f} MiB above a step's {row['peak_mib']['step']:.2f}"
    text = f"{row['ours_ms']['p50']:10.3f} ms"
    if row["ratio"] is not None:
        ratio = row["ratio"]
        text += f"  beside {row['beside_ms']['p50']:10.3f} ms"
        text += f"  ratio {ratio['p50']:6.3f} [{ratio['p20']:6.3f} {ratio['p80']:6.3f}]"
    if row["gbps"]:
        text += f"  {row['gbps']:6.2f} GB/s"
    if row["copy_share"]:
        text += f" {100 * row['copy_share']:4.0f} % of copy"
    return text


def summary(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["name"]) for row in rows)
    verdict = {True: "met", False: "MISSED", None: ""}
    lines = []
    for row in rows:
        target = f"  {Target(**row['target'])}: {verdict[row['met']]}" if row["met"] is not None else ""
        lines.append(f"{row['name']:<{width}}  {_figures(row)}{target}")
    judged = [row for row in rows if row["met"] is not None]
    if judged:
        lines.append(f"{sum(row['met'] for row in judged)} of {len(judged)} targets met")
    else:
        lines.append("a smoke run: its sizes say nothing about the targets, none was judged")
    return "\n".join(lines)


def _count(text: str) -> int:
    return int(float(text))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, seconds; nothing is judged")
    parser.add_argument("--sizes", type=_count, nargs="+", metavar="N", help="elements of the linear cases")
    parser.add_argument("--elements", type=_count, metavar="N", help="of the step and refresh cases (1e8)")
    parser.add_argument("--memory-elements", type=_count, metavar="N", help="of the memory cases (1e8)")
    parser.add_argument("--seconds", type=float, help="a case, about (6)")
    parser.add_argument("--min-rounds", type=int, help="at least so many rounds a case (20)")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads (2)")
    parser.add_argument("--backend", help="of MaskedEMAAdamW (auto)")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--out", type=Path, help="folder of the result file (whole runs: bench/results)")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    args = parser.parse_args(argv)
    if args.quick and args.check:
        parser.error("--quick judges no target, so there is nothing to --check")

    names = ("elements", "memory_elements", "seconds", "min_rounds", "threads", "backend")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.sizes:
        given["sizes"] = tuple(sorted(args.sizes))
    plan = replace(Plan().quick() if args.quick else Plan(), **given)
    complete = plan == Plan() and set(args.only) == set(GROUPS)

    rows = measure(plan, set(args.only), complete)
    print("\n" + summary(rows))
    out = args.out or (results.RESULTS if complete else None)
    if out is None:
        print("not written: not the whole run (--out FOLDER writes it)")
    else:
        print(f"written: {results.append(rows, out)}")
    return 1 if args.check and any(row["met"] is False for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
