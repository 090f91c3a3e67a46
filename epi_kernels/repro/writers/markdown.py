"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from epi_kernels.markdown import escape, table
from epi_kernels.repro.tables.base import Rendered

from .cells import Laid, Marks, Parts, lay_out
from .findings import ordered

MARKS = Marks(interval=" ({} to {})", n=", n = {}", paper="[{}]", mark="<sup>{}</sup>")


def markdown(rendered: Rendered, heading: str = "###", images: Mapping[str, str] | None = None) -> str:
    """Heading, table, notes, and those figures that ``images`` (name -> path) has a file for."""
    laid = lay_out(rendered)
    blocks = [f"{heading} {escape(rendered.title)}"]
    if laid.rows:
        blocks.append(_table(laid))
    blocks.append(escape(laid.caption))
    footnotes = [f"- <sup>{number}</sup> {escape(note)}" for number, note in enumerate(laid.footnotes, 1)]
    blocks.append("\n".join([*footnotes, *(f"- {escape(note)}" for note in rendered.notes)]))
    blocks.append(figures(rendered, images or {}))
    return "\n\n".join(block for block in blocks if block) + "\n"


def rows(*tables: Rendered) -> str:
    """The rows alone, each table under its title; what the numbers are is said once, the notes are left to the page."""
    laid = [(one, lay_out(one)) for one in tables if one.rows]
    blocks = [f"**{escape(one.title)}**\n\n{_table(shape)}" for one, shape in laid]
    captions = dict.fromkeys(escape(shape.caption) for _, shape in laid if shape.caption)
    return "\n\n".join([*blocks, *captions])


def figures(rendered: Rendered, images: Mapping[str, str]) -> str:
    """Its figures that ``images`` has a file for, with their captions."""
    return "\n\n".join(
        f"![{escape(figure.caption)}]({images[figure.name]})\n\n{escape(figure.caption)}"
        for figure in rendered.figures
        if figure.name in images
    )


def findings(*tables: Rendered) -> str:
    """A list: what held, what did not, at which scale."""
    sentences = [sentence for one in tables for sentence in one.findings]
    lines = [f"- **{title}.** {escape(one)}" for title, group in ordered(sentences) for one in group]
    return "\n".join(lines)


def _table(laid: Laid) -> str:
    cells = [[_cell(cell) for cell in row] for row in laid.rows]
    return table([escape(one) for one in laid.header], cells, laid.align)


def _cell(cell: Parts) -> str:
    text = escape(cell.main) + (f" ± {cell.sd}" if cell.sd else "")
    return MARKS.after(text, cell)
