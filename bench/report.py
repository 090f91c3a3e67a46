"""make tables: writes the README's tables and plots from the newest results, the tables between their markers.

python -m bench.report             rewrites README.md and the plots beside it (bench/plots.py)
python -m bench.report --check     exits 1 when README.md or a plot is out of date

<!-- bench:begin NAME -->          NAME: cpu (the newest whole run of bench.run), cpu-avx2 (its newest steps and
<!-- bench:end NAME -->            refreshes without AVX-512), side-by-side and quality (of bench.side_by_side
                                   and bench.quality), memory (counted from real optimizers, here and
                                   now), exactness, stopped and codebooks (of bench.exactness and so on),
                                   isolated-rows (of bench.isolated_rows), gpu and gpu-large
                                   (bench.gpu_table), gpu-status and reproduce-medium-status (bench.status)

<!-- reproduce:begin TABLE -->     a table of `epi-kernels reproduce`, from the bundles in REPRODUCED (epi_kernels.repro.readme)
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from bench import (
    codebooks,
    exactness,
    gpu_table,
    isolated_rows,
    memory_table,
    plots,
    quality_record,
    results,
    side_by_side_table,
    status,
    stopped,
)
from bench.markdown import Row, count, ratio
from bench.sources import changed_since
from epi_kernels.markdown import rewrite_blocks, table
from epi_kernels.repro import readme as repro_readme
from epi_kernels.repro.output import render

README = results.ROOT / "README.md"
# words of the README's markers -> bundle of manifests (a sweep's results.json, committed)
REPRODUCED = {
    "reproduce": "reproduce-small.json",
    "reproduce-tuning": "reproduce-small-tuning.json",
    "reproduce-sweeps": "reproduce-small-sweeps.json",
    "reproduce-imbalance": "reproduce-small-imbalance.json",
    "reproduce-search": "reproduce-beyond-search.json",
    "reproduce-beyond": "reproduce-beyond.json",
}

# ---------------------------------------------------------------- cpu


def _verdict(row: Row) -> str:
    if row["target"] is None:
        return "-"
    target = row["target"]
    unit = " ms" if target["figure"].startswith("ours_ms") else ""  # else of a ratio
    return f"{target['high']:g}{unit} {'met' if row['met'] else '**missed**'}"


STEP_TITLES = {
    "step-f32": "float32",
    "step-bf16": "bfloat16, rounding to nearest",
    "step-bf16-stochastic": "bfloat16, stochastic rounding",
    "step-bf16-int8": "bfloat16, 8-bit states, rounding to nearest",
    "step-bf16-int8-stochastic": "bfloat16, 8-bit states, stochastic rounding",
    "step-bf16-int8-24-bit-weights": "bfloat16 with 24 bits, 8-bit states, stochastic rounding",
    "step-bf16-32-bit-weights": "bfloat16 with 32 bits, stochastic rounding",
    "step-f32-own-importance": "float32, importance of its own",
    "step-f32-ratio-0": "float32, ratio 0",
    "tensors-f32-300-tiny": "float32, 300 tensors of 16",
    "tensors-bf16-300-tiny": "bfloat16, 300 tensors of 16",
    "tensors-mixed-300-tiny": "float32 and bfloat16 in turn, 300 tensors of 16",
    "tensors-mixed-int8-24-bit-weights-300-tiny": "the same, 8-bit states (float32 at this size), 24-bit weights",
    "tensors-f32-300": "float32, 300 tensors of 1,000",
    "tensors-f32-300-fsdp2": "the same under FSDP2, one rank",
}


def _step_table(rows: list[Row]) -> str:
    named = {row["name"]: row for row in rows}
    lines = [
        [
            title,
            count(row["elements"]),
            f"{row['ours_ms']['p50']:.3g}",
            f"{row['beside_ms']['p50']:.3g}",
            ratio(row),
            _verdict(row),
            f"{row['gbps']:.1f} ({100 * row['copy_share']:.0f} %)",
        ]
        for title, row in ((title, named.get(name)) for name, title in STEP_TITLES.items())
        if row is not None
    ]
    header = [
        "step, isolation on",
        "elements",
        "ours, ms",
        "torch fused, ms",
        "ratio",
        "at most",
        "GB/s (of a copy)",
    ]
    return table(header, lines, "lrrrrrr")


def _host_line(rows: list[Row]) -> str:
    """The float32 step beside what ``offload="cpu"`` is held against; empty where it was not measured."""
    lines = [
        f"beside {row['beside']} {ratio(row)}, at most {_verdict(row)}"
        for row in rows
        if row["group"] == "host"
    ]
    return f'The float32 step as `offload="cpu"` takes it: {"; ".join(lines)}.' if lines else ""


def _refresh_table(rows: list[Row]) -> str:
    """Ratio to a step, after a step and stand-alone, of every variant."""
    named = {row["name"]: row for row in rows}
    variants = sorted(
        {m[1] for r in rows if (m := re.match(r"refresh-(?:f32|bf16)-(.*)-after-step$", r["name"]))}
    )
    lines = []
    for variant in variants:
        cells = [
            named.get(f"refresh-{dtype}-{variant}-{kind}")
            for dtype in ("f32", "bf16")
            for kind in ("after-step", "stand-alone")
        ]
        lines.append(
            [
                variant.replace("-", ", "),
                *("noise" if row is not None and results.is_noise(row) else ratio(row) for row in cells),
            ]
        )
    judged = [
        row for row in rows if row["group"] == "refresh" and (row["met"] is not None or results.is_noise(row))
    ]
    refreshes = [row for row in judged if not results.is_noise(row)]
    met = sum(row["met"] for row in refreshes)
    header = [
        "refresh / step",
        "float32, after a step",
        "stand-alone",
        "bfloat16, after a step",
        "stand-alone",
    ]
    note = f"At most 1 is the target: {met} of {len(refreshes)} met."
    if len(judged) > len(refreshes):
        note += (
            f" {len(judged) - len(refreshes)} could not be told from the noise of the steps they are a part of, "
            "and are not counted."
        )
    return table(header, lines, "lrrrr") + "\n\n" + note


def _line(line: dict[str, float]) -> str:
    return f"{line['fixed']:.2f} ms + {1e6 * line['each']:.2f} ns an element, within {line['deviation']:.0%}"


def _linear_table(rows: list[Row]) -> str:
    steps = sorted(
        (r for r in rows if re.fullmatch(r"linear-step-f32-\d.*", r["name"])), key=lambda r: r["elements"]
    )
    refreshes = {r["elements"]: r for r in rows if re.fullmatch(r"linear-refresh-.*-stand-alone", r["name"])}
    lines = []
    for row in steps:
        refresh = refreshes.get(row["elements"])
        torch_ns = 1e6 * row["beside_ms"]["p50"] / row["elements"]
        lines.append(
            [
                count(row["elements"]),
                f"{row['ns_per_element']:.2f}",
                f"{torch_ns:.2f}",
                "-" if refresh is None else f"{refresh['ns_per_element']:.2f}",
                f"{row['gbps']:.1f} ({100 * row['copy_share']:.0f} %)",
            ]
        )
    header = [
        "elements, float32, cold caches",
        "step, ns each",
        "torch fused, ns each",
        "refresh, ns each",
        "GB/s (of a copy)",
    ]
    fits = [
        f"{'Step' if 'step' in row['name'] else 'Refresh'}: "
        + (_line(row["line"]) if "line" in row else f"largest / tenth {row['cost_ratio']:.3f}")
        + ("" if row["met"] is None else " (met)" if row["met"] else " (**missed**)")
        for row in rows
        if "line" in row or "cost_ratio" in row
    ]
    note = (
        "Linear cost is one line, a fixed cost a call and one an element, within 30 % of the costs at all sizes, "
        "and a cost an element at the largest size at most 1.3 times that at a tenth of it. "
        + "; ".join(fits)
        + "."
    )
    return table(header, lines, "rrrrr") + "\n\n" + note


def _memory_line(rows: list[Row]) -> str:
    peaks = [row for row in rows if row["group"] == "memory"]
    if not peaks:
        return ""
    worst = max(row["extra_mib"]["refresh"] for row in peaks)
    verdict = "met" if all(row["met"] for row in peaks) else "**missed**"
    return f"Peak memory of a refresh over {count(peaks[0]['elements'])} elements: {worst:.2f} MiB above a step's (at most 1: {verdict})."


def cpu(folder: Path = results.RESULTS) -> str:
    rows = results.newest_complete(folder)
    if rows is None:
        return "Not measured yet: `make bench`."
    first = rows[0]
    facts, backend = first["machine"], next(row["backend"] for row in rows if row["name"] == "step-f32")
    copy = next(row for row in rows if row["name"] == "copy")
    caption = (
        f"{facts['cpu']}, {facts['cores']} cores, {first['threads']} threads, `{backend}` backend ({facts['isa']}), "
        f"torch {first['versions']['torch']}, {first['date'][:10]}, commit {first['commit']}"
        + (" with uncommitted changes" if first["dirty"] else "")
        + (f", on a busy machine (load {first['load_before']})" if first["load_before"] > 0.5 else "")
        + f"{changed_since(first, 'cpu')}; a copy moves {copy['gbps']:.1f} GB/s. A share above 100 % is no error: a step writes lines it has "
        "read, a copy must fetch lines it only writes, and those bytes are not counted."
    )
    parts = [
        caption,
        _step_table(rows),
        _host_line(rows),
        _refresh_table(rows),
        _linear_table(rows),
        _memory_line(rows),
    ]
    return "\n\n".join(part for part in parts if part)


def _avx2(folder: Path) -> str:
    """A sentence of the newest steps and refreshes without AVX-512, whole run or not."""
    runs = [results.load(path) for path in sorted(folder.glob("cpu-*.json"))]
    runs = [rows for rows in runs if rows[0]["machine"]["isa"] == "avx2" and not rows[0]["dirty"]]
    if not runs:
        return "Without AVX-512: not measured yet."
    rows = max(runs, key=lambda rows: rows[0]["date"])
    step = {
        row["name"]: f"{row['ratio']['p50']:.2f}" for row in rows if row["group"] == "step" and row["ratio"]
    }
    refreshes = [row for row in rows if row["group"] == "refresh" and row["met"] is not None]
    least = sum(row["met"] for row in refreshes)
    first = rows[0]
    return (
        f"Without AVX-512 arithmetic weighs more ({first['machine']['cpu']}, `avx2`, torch {first['versions']['torch']}, "
        f"{first['date'][:10]}, commit {first['commit']}{changed_since(first, 'cpu')}): of torch's step the float32 one takes "
        f"{step['step-f32']}, the bfloat16 one {step['step-bf16']} (stochastic rounding {step['step-bf16-stochastic']}), the one "
        f"with 8-bit states {step['step-bf16-int8']} (stochastic rounding {step['step-bf16-int8-stochastic']}, where at most 0.9 "
        f"is the target); {least} of {len(refreshes)} refreshes cost at most a step (the most "
        f"{max(row['ratio']['p50'] for row in refreshes):.2f})."
    )


# ---------------------------------------------------------------- README

SECTIONS: dict[str, Callable[[Path], str]] = {
    "cpu": cpu,
    "cpu-avx2": _avx2,
    "memory": lambda _: memory_table.text(),
    "quality": quality_record.section,
    "isolated-rows": isolated_rows.section,
    "side-by-side": side_by_side_table.text,
    "exactness": exactness.text,
    "stopped": stopped.text,
    "codebooks": codebooks.text,
    "gpu": gpu_table.timings,
    "gpu-large": gpu_table.large,
    "gpu-status": status.line,
    "reproduce-medium-status": status.medium_line,
}


def rewrite(text: str, folder: Path = results.RESULTS) -> str:
    """The README with every marked block written anew from the results in a folder; a marker of an unknown name is an error."""
    return rewrite_blocks(
        text, "bench", {name: lambda make=make: make(folder) for name, make in SECTIONS.items()}
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when out of date")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    args = parser.parse_args(argv)
    old = args.readme.read_text()
    new = rewrite(old, args.results)
    stale = plots.stale(args.readme.parent, args.results)
    for tool, file in REPRODUCED.items():
        stale += repro_readme.stale(args.readme, args.results / file, render, tool)
    if new == old and not stale:
        print(f"{args.readme.name} and its plots are up to date")
        return 0
    if args.check:
        names = dict.fromkeys(([args.readme.name] if new != old else []) + stale)
        print(f"out of date: {', '.join(names)}: make tables", file=sys.stderr)
        return 1
    for name in plots.write(args.readme.parent, args.results):
        print(f"{name}: drawn anew")
    if new != old:
        args.readme.write_text(new)
        print(f"{args.readme.name}: tables rewritten")
    for tool, file in REPRODUCED.items():
        for name in repro_readme.write_readme(args.readme, args.results / file, render, tool):
            print(f"{name}: made anew")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
