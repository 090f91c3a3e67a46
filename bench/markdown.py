"""Cells of the README's tables, from result rows."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def ratio(row: Row | None) -> str:
    """Median and the 20th and 80th percentile of a row's paired ratios."""
    if row is None:
        return "-"
    found = row["ratio"]
    return f"{found['p50']:.2f} ({found['p20']:.2f}-{found['p80']:.2f})"


def count(n: int) -> str:
    return f"{n:,}"
