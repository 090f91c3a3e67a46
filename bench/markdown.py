"""Cells and tables of the README, from result rows."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def table(header: list[str], rows: list[list[str]], align: str = "") -> str:
    """Markdown; ``align``: one of l, r a column."""
    rule = ["---:" if side == "r" else "---" for side in align.ljust(len(header), "l")]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def ratio(row: Row | None) -> str:
    """Median and the 20th and 80th percentile of a row's paired ratios."""
    if row is None:
        return "-"
    found = row["ratio"]
    return f"{found['p50']:.2f} ({found['p20']:.2f}-{found['p80']:.2f})"


def count(n: int) -> str:
    return f"{n:,}"
