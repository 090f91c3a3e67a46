"""Text that commands print: sizes and columns."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def human_bytes(count: float) -> str:
    """1536 -> '1.50 KiB'."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.2f} {unit}"
    return f"{count / 1024:.2f} GiB"


def columns(lines: Iterable[Sequence[str]], left: Collection[int] = (0,), rule: bool = False) -> str:
    """Cells in columns two spaces apart, flush right but for those in `left`; `rule` underlines the first line."""
    cells = [list(line) for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if rule:
        cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in cells
    )


def span(value: float, bounds: Sequence[float] | None) -> str:
    """A constant setting, or the bounds of one that adapts."""
    shown = [value] if bounds is None else bounds
    return " to ".join(str(one) if isinstance(one, int) else f"{one:g}" for one in shown)
