"""A rendered table taken apart into what every format shows of it; the formats only put marks around the parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from epi_kernels.repro.statistics import LEVEL, summary
from epi_kernels.repro.tables.base import Cell, Rendered


@dataclass(frozen=True)
class Parts:
    """What a cell says, as text; "" for what it has not."""

    main: str  # the mean, or the text
    sd: str = ""
    interval: tuple[str, str] | None = None
    difference: bool = False  # the interval says something about zero
    excludes_zero: bool = False
    n: int | None = None  # where it is not the table's
    paper: str = ""
    mark: int | None = None  # number of its footnote
    numeric: bool = False


@dataclass(frozen=True)
class Laid:
    header: tuple[str, ...]
    align: str  # one of l, r a column
    rows: list[list[Parts]]
    caption: str  # what the numbers are, n among it; "" where there are none
    footnotes: list[str] = field(default_factory=list)  # number 1 first


def lay_out(rendered: Rendered, below: bool = False) -> Laid:
    """Raises ValueError when a row has not one cell a column, its label included.

    ``below``: the format shows every interval, below its mean; else those of differences, in parentheses.
    """
    for row in rendered.rows:
        if len(row) != len(rendered.columns):
            raise ValueError(
                f"table {rendered.name}: the row {_label(row)!r} has {len(row)} cells for {len(rendered.columns)} columns"
            )
    sizes = {
        len(cell.values) for row in rendered.rows for cell in row if isinstance(cell, Cell) and cell.values
    }
    common = sizes.pop() if len(sizes) == 1 else None
    numbers: dict[str, int] = {}
    rows = [[parts(cell, common, numbers) for cell in row] for row in rendered.rows]
    align = "".join("r" if any(one.numeric for one in column) else "l" for column in zip(*rows))
    return Laid(rendered.columns, align, rows, _caption(rows, common, below), list(numbers))


def parts(cell: Cell | str, common: int | None, numbers: dict[str, int]) -> Parts:
    """``common``: the n that is stated for the whole table. ``numbers``: of the footnotes so far; it grows."""
    if isinstance(cell, str):
        return Parts(cell)
    mark = numbers.setdefault(cell.note, len(numbers) + 1) if cell.note else None
    paper = "" if cell.paper is None else number(cell.paper, _printed_digits(cell), cell.signed)
    if not cell.values:
        return Parts(cell.text or ("" if paper else "-"), paper=paper, mark=mark, numeric=bool(paper))
    found = summary(cell.values)
    ends = found.interval and [number(end, cell.digits, cell.signed) for end in found.interval]
    return Parts(
        number(found.mean, cell.digits, cell.signed),
        number(found.sd, cell.digits) if found.n > 1 else "",
        (ends[0], ends[1]) if ends else None,
        cell.signed,
        found.excludes_zero,
        None if common else found.n,
        paper,
        mark,
        True,
    )


@dataclass(frozen=True)
class Marks:
    """What a format puts around the parts of a cell: a template each."""

    interval: str
    n: str
    paper: str
    mark: str

    def after(self, text: str, cell: Parts) -> str:
        """The cell. ``text``: its mean and sd, or its text, as the format has them."""
        if cell.difference and cell.interval:
            text += self.interval.format(*cell.interval)
        if cell.n is not None:
            text += self.n.format(cell.n)
        if cell.paper:
            text = f"{text} {self.paper.format(cell.paper)}".strip()
        return text if cell.mark is None else text + self.mark.format(cell.mark)


def number(value: float, digits: int, signed: bool = False) -> str:
    """Fixed point; a value that rounds to zero has no sign."""
    if not math.isfinite(value):
        return str(value)
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text


def _printed_digits(cell: Cell) -> int:
    """The paper's digits are all shown, whatever the number of ours."""
    return max(cell.digits, len(repr(float(cell.paper or 0)).partition(".")[2].rstrip("0")))


def _label(row: Sequence[Cell | str]) -> str:
    return "" if not row else row[0] if isinstance(row[0], str) else row[0].text


def _caption(rows: list[list[Parts]], common: int | None, below: bool) -> str:
    cells = [cell for row in rows for cell in row if cell.numeric]
    said: list[str] = []
    if common == 1:
        said.append("one seed (n = 1), no spread")
    elif any(cell.sd for cell in cells):
        said.append("mean ± sd over seeds" + (f", n = {common}" if common else ""))
    if any(cell.interval and (below or cell.difference) for cell in cells):
        where = "below it" if below else "in parentheses"
        said.append(f"{where} the {100 * LEVEL:g} % interval of the mean (Student's t)")
    if below and any(cell.difference and cell.excludes_zero for cell in cells):
        said.append("bold: the interval of a difference excludes zero")
    if any(cell.paper for cell in cells):
        said.append("in brackets what the paper prints")
    text = "; ".join(said)
    return text[:1].upper() + text[1:] + "." if text else ""
