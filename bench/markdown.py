"""Tables as the README has them."""

from __future__ import annotations


def table(header: list[str], rows: list[list[str]], align: str = "") -> str:
    """Markdown; ``align``: one of l, r a column."""
    rule = ["---:" if side == "r" else "---" for side in align.ljust(len(header), "l")]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))
