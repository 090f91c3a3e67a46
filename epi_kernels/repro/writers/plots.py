"""Figures of tables, drawn without a display: SVG for the page, PNG for files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from epi_kernels.files import whole
from epi_kernels.report import figures
from epi_kernels.repro.tables.base import Figure

DPI = 150


def drawn(figure: Figure) -> Any:
    """The matplotlib figure, with what its table draws on it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=figure.size, layout="constrained")
    FigureCanvasAgg(canvas)
    figure.draw(canvas)
    return canvas


def svg(figure: Figure) -> str:
    return figures.svg(drawn(figure))


def write_png(figure: Figure, path: Path, data: str = "") -> Path:
    """Whole or not at all; ``data``: a digest of what is shown, kept in the file (`shows`)."""
    buffer = io.BytesIO()
    metadata = {"Software": None, "Comment": f"data {data}" if data else None}
    drawn(figure).savefig(buffer, format="png", dpi=DPI, metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        partial.write_bytes(buffer.getvalue())
    return path


def shows(path: Path, data: str) -> bool:
    """Whether the file is there and was drawn from data of this digest, by whatever matplotlib."""
    return path.exists() and f"data {data}".encode() in path.read_bytes()
