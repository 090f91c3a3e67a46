"""One run of `make quality` as one JSON object: bench/results/quality-MACHINE-DATE-COMMIT.json.

schema, machine, versions, commit, dirty, date, load_before: where and of what. settings, parameters,
workers, wall_s: how. runs: one a training run. rows: their summary, one a ratio and configuration.
Files are added, never edited.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import results
from epi_kernels.markdown import table

BASE = "float32"  # the configuration that the others are compared with

Run = dict[str, Any]


# ---------------------------------------------------------------- arithmetic


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two boolean masks [n]: what is in both, as a share of what is in either; 1 when both are empty.

    Raises:
        ValueError: the masks differ in shape.
    """
    if a.shape != b.shape:
        raise ValueError(f"masks of shapes {a.shape} and {b.shape}")
    either = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / either if either else 1.0


def within_spread(losses: Sequence[float], base: Sequence[float]) -> bool:
    """Whether two means differ by at most the base's largest value less its smallest (a NaN does not lie within)."""
    return abs(statistics.fmean(losses) - statistics.fmean(base)) <= max(base) - min(base)


def summarize(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a ratio and configuration, in the runs' order, over the seeds.

    ``held_out_loss`` in nats a character; its ``sd`` is the sample's, None for a single seed. ``difference``: of
    the means, above 0 where float32 is better. ``jaccard``: with the float32 run's mask of the same seed, None for
    float32 itself.

    Raises:
        ValueError: a ratio without float32 runs.
    """
    groups: dict[tuple[float, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["ratio"], run["configuration"]), []).append(run)
    rows = []
    for (ratio, name), group in groups.items():
        if (ratio, BASE) not in groups:
            raise ValueError(f"no {BASE} runs at ratio {ratio}")
        base = [run["held_out_loss"] for run in groups[ratio, BASE]]
        losses = [run["held_out_loss"] for run in group]
        overlaps = [run["jaccard"] for run in group if run["jaccard"] is not None]
        rows.append(
            {
                "ratio": ratio,
                "configuration": name,
                "seeds": len(group),
                "held_out_loss": {
                    "mean": statistics.fmean(losses),
                    "sd": statistics.stdev(losses) if len(losses) > 1 else None,
                    "min": min(losses),
                    "max": max(losses),
                },
                "difference": statistics.fmean(losses) - statistics.fmean(base),
                "float32_spread": max(base) - min(base),
                "within_spread": within_spread(losses, base),
                "jaccard": {
                    "mean": statistics.fmean(overlaps),
                    "min": min(overlaps),
                    "max": max(overlaps),
                }
                if overlaps
                else None,
                "state_bytes_per_parameter": statistics.fmean(
                    run["state_bytes"] / run["parameters"] for run in group
                ),
            }
        )
    return rows


# ---------------------------------------------------------------- files


def write_new(record: dict[str, Any], folder: Path) -> Path:
    """The whole record at a new path in ``folder``; a file that exists is never written to."""
    stem = f"quality-{results.machine_slug(record['machine'])}-{record['date'][:10]}-{record['commit']}"
    return results.write_record(record, folder, stem, ("runs", "rows"))


def newest(folder: Path) -> dict[str, Any] | None:
    return results.newest_record(folder, "quality")


# ---------------------------------------------------------------- README


def _verdict(row: dict[str, Any]) -> str:
    if row["seeds"] == 1:  # no spread
        return "-"
    if row["configuration"] == BASE:
        return f"(spread {row['float32_spread']:.3f})"
    return "yes" if row["within_spread"] else "**no**"


def _cells(row: dict[str, Any]) -> list[str]:
    loss, overlap = row["held_out_loss"], row["jaccard"]
    spread = "" if loss["sd"] is None else f" ± {loss['sd']:.3f}"
    return [
        f"{100 * row['ratio']:g} %",
        row["configuration"],
        f"{loss['mean']:.3f}{spread}",
        "-" if row["configuration"] == BASE else f"{row['difference']:+.3f}",
        _verdict(row),
        "-" if overlap is None else f"{overlap['mean']:.2f} ({overlap['min']:.2f}-{overlap['max']:.2f})",
        f"{row['state_bytes_per_parameter']:.2f}",
    ]


def rows_table(rows: Sequence[dict[str, Any]]) -> str:
    header = [
        "p",
        "weights and states",
        "held-out loss",
        "less float32's",
        "within float32's seeds",
        "Jaccard with float32's mask",
        "state, bytes a parameter",
    ]
    return table(header, [_cells(row) for row in rows], "llrrrrr")


def section(folder: Path = results.RESULTS) -> str:
    """The README's block: where the newest run was made, and its rows."""
    record = newest(folder)
    if record is None:
        return "Not measured yet: `make quality`."
    facts, settings = record["machine"], record["settings"]
    chance = ", ".join(f"{p / (2 - p):.3f} at p = {100 * p:g} %" for p in settings["ratios"])
    caption = (
        f"{record['parameters']:,} parameters, {settings['steps']:,} steps, {len(settings['seeds'])} seeds, "
        f"H = {settings['interval']}; {facts['cpu']} ({facts['isa']}), torch {record['versions']['torch']}, "
        f"{record['date'][:10]}, commit {record['commit']}"
        + (" with uncommitted changes" if record["dirty"] else "")
    )
    judged = [row for row in record["rows"] if row["configuration"] != BASE]
    note = (
        f"Loss in nats a character, mean ± standard deviation over seeds; within: the means differ by at most "
        f"float32's largest loss less its smallest ({sum(row['within_spread'] for row in judged)} of {len(judged)}). "
        f"Jaccard: mean (least-most) over seeds; two random masks: {chance}."
    )
    return f"{caption}.\n\n{rows_table(record['rows'])}\n\n{note}"
