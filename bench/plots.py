"""The README's plots, drawn from the newest results: SVG files under bench/plots, one a name in PLOTS.

A file ends with a digest of what it shows, so that whether it is out of date does not depend on the matplotlib
that drew it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import memory_table, quality_record, results, side_by_side_table
from epi_kernels.report import figures

FOLDER = Path("bench") / "plots"  # below the README's folder
OURS, ISOLATING, OTHER = figures.COLORS[0], figures.COLORS[1], "#b8c0ca"


@dataclass(frozen=True)
class Plot:
    """``data(results folder)``: what is shown, ready for JSON, or None where nothing was measured. ``draw(data)``: SVG."""

    data: Callable[[Path], Any]
    draw: Callable[[Any], str]

    def file(self, folder: Path) -> str | None:
        data = self.data(folder)
        return None if data is None else f"{self.draw(data)}{_signature(data)}\n"


def _signature(data: Any) -> str:
    return f"<!-- data {hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]} -->"


# ---------------------------------------------------------------- side by side


def _side_by_side(folder: Path) -> list[dict[str, Any]] | None:
    """Contenders over the first list on a CPU, those that ran."""
    rows = side_by_side_table.newest(folder)
    if rows is None:
        return None
    keys = ("contender", "isolates", "ratio", "state_bytes_per_element")
    return [
        {key: row[key] for key in keys} for row in rows if row["list"] == rows[0]["list"] and "ratio" in row
    ]


def _draw_side_by_side(rows: list[dict[str, Any]]) -> str:
    quantile = {name: [row["ratio"][name] for row in rows] for name in ("p20", "p50", "p80")}
    panels = [
        figures.Panel(
            "step, of torch's fused AdamW with the same weights",
            quantile["p50"], quantile["p20"], quantile["p80"], log=True, number="{:.2f}", reference=1.0,
        ),
        figures.Panel("state, bytes a parameter", [row["state_bytes_per_element"] for row in rows]),
    ]  # fmt: skip
    colors = [_color(row["contender"], row["isolates"]) for row in rows]
    return figures.horizontal_bars([row["contender"] for row in rows], panels, colors)


def _color(name: str, isolates: bool) -> str:
    return OURS if name.startswith("ours") else ISOLATING if isolates else OTHER


# ---------------------------------------------------------------- memory


def _memory(folder: Path) -> list[dict[str, Any]]:
    return [{"name": line.name, "sizes": line.sizes} for line in memory_table.lines()]


def _draw_memory(rows: list[dict[str, Any]]) -> str:
    parts = [
        (title, [row["sizes"][kind] for row in rows])
        for kind, title in zip(memory_table.KINDS, memory_table.TITLES, strict=True)
    ]
    panel = figures.Panel("state, bytes a parameter", parts=parts, number="{:.4g}")
    return figures.horizontal_bars([row["name"] for row in rows], [panel], [])


# ---------------------------------------------------------------- cost


def _cost(folder: Path) -> dict[str, list[list[float]]] | None:
    """(elements, ns an element) from cold caches, a series each of our step, torch's and our refresh."""
    rows = results.newest_complete(folder)
    if rows is None:
        return None
    steps = [row for row in rows if re.fullmatch(r"linear-step-f32-\d.*", row["name"])]
    refreshes = [row for row in rows if re.fullmatch(r"linear-refresh-.*-stand-alone", row["name"])]

    def series(rows: list[dict[str, Any]], ms: str) -> list[list[float]]:
        return sorted([row["elements"], 1e6 * row[ms]["p50"] / row["elements"]] for row in rows)

    return {
        "step, isolation on": series(steps, "ours_ms"),
        "torch's fused AdamW": series(steps, "beside_ms"),
        "refresh": series(refreshes, "ours_ms"),
    }


def _draw_cost(data: dict[str, list[list[float]]]) -> str:
    series = [
        figures.Series(name, [x for x, _ in points], [y for _, y in points], marker="o")
        for name, points in data.items()
    ]
    return figures.lines(series, "float32 elements of one tensor, cold caches", "ns an element", log=True)


# ---------------------------------------------------------------- training quality


def _quality(folder: Path) -> list[dict[str, Any]] | None:
    record = quality_record.newest(folder)
    if record is None:
        return None
    keys = ("ratio", "configuration", "held_out_loss", "jaccard")
    return [{key: row[key] for key in keys} for row in record["rows"]]


def _draw_quality(rows: list[dict[str, Any]]) -> str:
    def spread(key: str, end: str) -> list[float | None]:
        return [None if row[key] is None else row[key][end] for row in rows]

    panels = [
        figures.Panel(label, *(spread(key, end) for end in ("mean", "min", "max")), number="{:.2f}")
        for key, label in (
            ("held_out_loss", "held-out loss, nats a character"),
            ("jaccard", "Jaccard with float32's mask"),
        )
    ]
    labels = [f"{100 * row['ratio']:g} %, {row['configuration']}" for row in rows]
    wide = re.compile(
        rf"{quality_record.BASE}(?!.*states)"
    )  # float32 weights and states, whatever else was done
    colors = [OTHER if wide.match(row["configuration"]) else OURS for row in rows]
    return figures.horizontal_bars(labels, panels, colors)


PLOTS = {
    "side-by-side": Plot(_side_by_side, _draw_side_by_side),
    "memory": Plot(_memory, _draw_memory),
    "cost": Plot(_cost, _draw_cost),
    "quality": Plot(_quality, _draw_quality),
}


def image(name: str, alt: str) -> str:
    """Markdown."""
    return f"![{alt}]({(FOLDER / name).as_posix()}.svg)"


def stale(root: Path, folder: Path) -> list[str]:
    """Plots under ``root`` that do not show what the newest results say, by path below it."""
    found = []
    for name, plot in PLOTS.items():
        path, data = root / FOLDER / f"{name}.svg", plot.data(folder)
        there = path.read_text() if path.exists() else None
        if data is None or there is None:
            outdated = (data is None) != (there is None)
        else:
            outdated = not there.endswith(f"{_signature(data)}\n")
        if outdated:
            found.append(path.relative_to(root).as_posix())
    return found


def write(root: Path, folder: Path) -> list[str]:
    """Draws the stale ones anew, and removes those that nothing was measured for; returns their paths."""
    changed = stale(root, folder)
    for name in changed:
        path = root / name
        text = PLOTS[path.stem].file(folder)
        if text is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return changed
