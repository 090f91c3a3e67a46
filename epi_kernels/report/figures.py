"""Figures as SVG text, drawn by matplotlib without a display.

Every function returns the SVG of one figure, the same bytes for the same input. Colours are the Okabe-Ito
palette, which stays distinct for colour-blind readers.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5b6675")
INK, SOFT, GRID = "#1c2430", "#5b6675", "#e6eaef"
WIDTH = 9.0  # inches; the page scales figures to its own width


@dataclass
class Series:
    """One line or one set of points. `xerr`/`yerr` are half-widths of error bars in the units of x and y."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str | None = None
    style: str = "-"
    width: float = 1.8
    alpha: float = 1.0
    marker: str = ""
    xerr: Sequence[float] | None = None
    yerr: Sequence[float] | None = None


def _axes(height: float, xlabel: str, ylabel: str):
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The object interface leaves pyplot's global state, and a caller's choice of backend, alone.
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    plain(axes, xlabel, ylabel)
    return figure, axes


def plain(axes, xlabel: str, ylabel: str) -> None:
    """Axes with two spines and a faint grid behind what is drawn."""
    axes.set_xlabel(xlabel, color=SOFT)
    axes.set_ylabel(ylabel, color=SOFT)
    axes.tick_params(colors=SOFT, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b8c0ca")
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def svg(figure) -> str:
    """A matplotlib figure as SVG text."""
    import matplotlib

    buffer = io.StringIO()
    # A fixed salt and no date make the bytes repeatable; paths instead of fonts make the page look alike everywhere.
    with matplotlib.rc_context({"svg.hashsalt": "epi-kernels", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _legend(axes, entries: int) -> None:
    if entries > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")


def lines(
    series: Sequence[Series],
    xlabel: str = "step",
    ylabel: str = "",
    marks: Sequence[float] = (),
    mark_label: str = "",
    ylim: tuple[float | None, float | None] | None = None,
    height: float = 3.6,
    log: bool = False,
) -> str:
    """Lines over a common x axis; `marks` are x positions drawn as thin vertical lines (refreshes of a mask, say)."""
    figure, axes = _axes(height, xlabel, ylabel)
    for index, mark in enumerate(marks):
        axes.axvline(
            mark,
            color="#9aa5b1",
            linewidth=0.8,
            linestyle=(0, (2, 3)),
            label=mark_label if index == 0 else None,
            zorder=1,
        )
    for index, one in enumerate(series):
        color = one.color or COLORS[index % len(COLORS)]
        marker = one.marker or ("o" if len(one.x) == 1 else None)
        axes.plot(
            one.x,
            one.y,
            one.style,
            color=color,
            linewidth=one.width,
            alpha=one.alpha,
            marker=marker,
            markersize=4.5,
            label=one.label,
        )
        if one.yerr is not None:
            low = [y - e for y, e in zip(one.y, one.yerr)]
            high = [y + e for y, e in zip(one.y, one.yerr)]
            axes.fill_between(one.x, low, high, color=color, alpha=0.15, linewidth=0)
    if ylim is not None:
        axes.set_ylim(*ylim)
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.margins(x=0.02)
    _legend(axes, len(series) + bool(marks))
    return svg(figure)


def points(
    series: Sequence[Series], xlabel: str, ylabel: str, height: float = 4.2, connect: bool = False
) -> str:
    """Points with error bars, one colour and one legend entry a series (score on a new task against score on the old one)."""
    figure, axes = _axes(height, xlabel, ylabel)
    for index, one in enumerate(series):
        color = one.color or COLORS[index % len(COLORS)]
        axes.errorbar(
            one.x, one.y, xerr=one.xerr, yerr=one.yerr, fmt=one.marker or "o", linestyle=one.style if connect else "none",
            color=color, markersize=7, elinewidth=1.2, capsize=3, label=one.label,
        )  # fmt: skip
    axes.margins(0.08)
    _legend(axes, len(series) + 1)
    return svg(figure)


def heatmap(
    values: Sequence[Sequence[float | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[object],
    xlabel: str = "step",
    color_label: str = "",
    vmax: float | None = None,
    gamma: float = 1.0,
) -> str:
    """A rows x columns heat map from 0 up; None is drawn as a gap. `gamma` < 1 spreads the colours of small values."""
    import numpy as np
    from matplotlib.colors import PowerNorm

    grid = np.array([[np.nan if cell is None else cell for cell in row] for row in values], dtype=float)
    figure, axes = _axes(max(2.2, 0.9 + 0.2 * len(row_labels)), xlabel, "")
    axes.grid(False)
    top = vmax if vmax is not None else (float(np.nanmax(grid)) if np.isfinite(grid).any() else 1.0)
    image = axes.imshow(
        grid, aspect="auto", cmap="viridis", norm=PowerNorm(gamma, 0.0, top or 1.0), interpolation="nearest"
    )
    axes.set_yticks(range(len(row_labels)), row_labels, fontsize=7.5 if len(row_labels) > 25 else 8.5)
    # At most 12 column labels, or they run into each other.
    stride = max(1, -(-len(column_labels) // 12))
    ticks = list(range(0, len(column_labels), stride))
    axes.set_xticks(ticks, [str(column_labels[tick]) for tick in ticks])
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.015)
    bar.set_label(color_label, color=SOFT, fontsize=9)
    bar.ax.tick_params(labelsize=8, colors=SOFT)
    bar.outline.set_visible(False)
    return svg(figure)


def bars(
    labels: Sequence[str],
    groups: Sequence[tuple[str, Sequence[float]]],
    ylabel: str = "",
    errors: Sequence[Sequence[float] | None] | None = None,
    number: str = "{:.4g}",
    height: float = 3.4,
) -> str:
    """Bars at `labels`, one colour a group (name, values); `errors` gives half-widths per group; values are written above."""
    figure, axes = _axes(height, "", ylabel)
    axes.grid(False, axis="x")
    width = 0.8 / max(1, len(groups))
    for index, (name, values) in enumerate(groups):
        at = [i + (index - (len(groups) - 1) / 2) * width for i in range(len(labels))]
        error = errors[index] if errors is not None else None
        drawn = axes.bar(
            at,
            values,
            width * 0.92,
            yerr=error,
            color=COLORS[index % len(COLORS)],
            label=name,
            capsize=3,
            ecolor=SOFT,
        )
        axes.bar_label(drawn, [number.format(value) for value in values], fontsize=9, padding=2, color=INK)
    axes.set_xticks(range(len(labels)), labels)
    axes.margins(y=0.14)
    _legend(axes, len(groups))
    return svg(figure)


@dataclass
class Panel:
    """Horizontal bars beside others: one value a label, None where there is none.

    ``low``, ``high``: ends of a spread. ``parts``, in place of ``values``: (name, values) stacked in one bar.
    ``reference``: a vertical line.
    """

    xlabel: str
    values: Sequence[float | None] = ()
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    parts: Sequence[tuple[str, Sequence[float]]] = ()
    log: bool = False
    number: str = "{:.3g}"
    reference: float | None = None


def horizontal_bars(labels: Sequence[str], panels: Sequence[Panel], colors: Sequence[str]) -> str:
    """One row a label and one column a panel; ``colors``: one a label. The values are written beside the bars."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 1.0 + 0.3 * len(labels)), layout="constrained")
    FigureCanvasSVG(figure)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    rows = range(len(labels))
    for axes, panel in zip(grid, panels):
        plain(axes, panel.xlabel, "")
        axes.grid(False, axis="y")
        if panel.log:
            axes.set_xscale("log")
        if panel.reference is not None:
            axes.axvline(panel.reference, color=SOFT, linewidth=1.0, linestyle=(0, (3, 3)))
        totals: list[float | None] = list(panel.values)
        if panel.parts:
            totals = [sum(column) for column in zip(*(values for _, values in panel.parts))]
            left = [0.0] * len(labels)
            for index, (name, values) in enumerate(panel.parts):
                axes.barh(rows, values, left=left, height=0.7, color=COLORS[index % len(COLORS)], label=name)
                left = [start + value for start, value in zip(left, values)]
            _legend(axes, len(panel.parts))
        ends = list(totals)
        for row, value in enumerate(totals):
            if value is None:
                continue
            if not panel.parts:
                axes.barh(row, value, height=0.7, color=colors[row])
            if panel.low is not None and panel.high is not None:
                low, high = panel.low[row], panel.high[row]
                if low is not None and high is not None:
                    axes.plot([low, high], [row, row], color=INK, linewidth=1.2)
                    ends[row] = max(value, high)
            text = panel.number.format(value)
            axes.annotate(
                text, (ends[row], row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=INK
            )  # fmt: skip
        axes.margins(x=0.16, y=0.02)
    grid[0].set_yticks(rows, labels, fontsize=8.5)
    grid[0].invert_yaxis()
    return svg(figure)
