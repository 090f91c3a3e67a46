"""All tables as one CSV file, a line a cell: the numbers unrounded, so that nobody has to read them off a table."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Sequence

from epi_kernels.repro.statistics import summary
from epi_kernels.repro.tables.base import Cell, Rendered

from .cells import lay_out

COLUMNS = (
    "table",
    "row",
    "column",
    "text",
    "mean",
    "sd",
    "n",
    "ci_low",
    "ci_high",
    "paper",
    "values",  # one a seed, by spaces
    "note",
)


def csv_text(tables: Iterable[Rendered]) -> str:
    """UTF-8 text; what a cell has not is left empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for rendered in tables:
        laid = lay_out(rendered)
        for row, shown in zip(rendered.rows, laid.rows):
            for column, cell in zip(rendered.columns[1:], row[1:]):
                writer.writerow([rendered.name, _label(row, shown[0].main), column, *_numbers(cell)])
    return buffer.getvalue()


def _label(row: Sequence[Cell | str], first: str) -> str:
    """All texts before the first number: one of them alone may stand on several rows (a model, a pair of tasks)."""
    more = itertools.takewhile(lambda cell: isinstance(cell, str), row[1:])
    return " | ".join([first, *(str(cell) for cell in more if cell)])


def _numbers(cell: Cell | str) -> list[object]:
    if isinstance(cell, str):
        cell = Cell(text=cell)
    paper = "" if cell.paper is None else cell.paper
    if not cell.values:
        return [cell.text, "", "", "", "", "", paper, "", cell.note]
    mean, sd, n, interval = summary(cell.values)
    ends = ("", "") if interval is None else interval
    return ["", mean, sd if n > 1 else "", n, *ends, paper, " ".join(map(repr, cell.values)), cell.note]
