"""Rendered tables as files: Markdown, CSV, LaTeX and plots. `cells` takes a table apart, a format puts it together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from epi_kernels.files import write_whole
from epi_kernels.repro.tables.base import Rendered

from .csv_file import csv_text
from .findings import failed, held, ordered, ours, scale
from .latex import latex
from .markdown import findings, markdown
from .plots import write_png


def write_tables(folder: Path, tables: Sequence[Rendered]) -> list[Path]:
    """tables.md, tables.csv, tables.tex and figures/NAME.png under the folder; returns their paths. OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {figure.name: f"figures/{figure.name}.png" for one in tables for figure in one.figures}
    texts = {
        "tables.md": "\n".join(
            [findings(*tables) + "\n", *(markdown(one, "##", images) for one in tables)]
        ).lstrip(),
        "tables.csv": csv_text(tables),
        "tables.tex": latex(tables),
    }
    for name, text in texts.items():
        write_whole(folder / name, text)
    pictures = [write_png(figure, folder / images[figure.name]) for one in tables for figure in one.figures]
    return [*(folder / name for name in texts), *pictures]


__all__ = [
    "csv_text", "failed", "findings", "held", "latex", "markdown", "ordered", "ours", "scale", "write_png", "write_tables",
]  # fmt: skip
