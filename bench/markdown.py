"""Cells of the README's tables, from result rows."""

from __future__ import annotations

from typing import Any

from bench.contenders import NOTES

Row = dict[str, Any]

SAME_STATE = 0.2  # bytes a parameter: a mask (1/8) and scales do not make states of another size


def ratio(row: Row | None) -> str:
    """Median and the 20th and 80th percentile of a row's paired ratios."""
    return "-" if row is None else spread(row["ratio"])


def spread(found: dict[str, float]) -> str:
    """Percentiles as one cell."""
    return f"{found['p50']:.2f} ({found['p20']:.2f}-{found['p80']:.2f})"


def count(n: int) -> str:
    return f"{n:,}"


def milliseconds(ms: float) -> str:
    return f"{ms:,.1f}" if ms < 100 else f"{ms:,.0f}"


def mib(n: float | None) -> str:
    return "-" if n is None else f"{n / 2**20:,.0f}"


def contender_name(row: Row) -> str:
    """Ours in bold."""
    return f"**{row['contender']}**" if row["contender"].startswith("ours") else row["contender"]


def alike(row: Row, reference: Row, state: str) -> tuple[str, str]:
    """Two cells: what a contender has in common with the one it is held against, and what not.

    Both step over the same weights and gradients, and the other is torch's, which rounds to nearest. ``state``: the key
    of the bytes of state, which a row that did not run lacks.
    """
    if row["contender"] == reference["contender"]:
        return "the reference", "-"
    like, unlike = ["weights", "gradients"], []
    if row["isolates"]:
        unlike.append("isolates")
    if state in row and state in reference:
        ours, theirs = row[state], reference[state]
        if abs(ours - theirs) <= SAME_STATE:
            like.append("size of the state")
        else:
            unlike.append(f"state of {ours:.1f} bytes, not {theirs:.1f}")
    if not row["isolates"]:
        like.append("isolates nothing")
    name = row["contender"]
    notes: str = NOTES[name] if name in NOTES else row["note"]  # as it is said today, where it is said
    for note in notes.split("; "):
        if note.endswith("round to nearest"):
            like.append(note)
        elif note != "isolates nothing":
            unlike.append(note)
    return ", ".join(like), "; ".join(unlike) or "-"
