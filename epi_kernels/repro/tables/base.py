"""A table: which runs it needs, and what it says once their manifests are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from epi_kernels.repro.manifest import Manifest
from epi_kernels.repro.preset import Preset
from epi_kernels.repro.runs import Run

Manifests = Mapping[str, Manifest]  # by runs.key


@dataclass(frozen=True)
class Cell:
    """A number over seeds, or text. ``paper``: the value the paper prints, where the set-up is comparable at all."""

    values: tuple[float, ...] = ()  # one a seed
    text: str = ""
    paper: float | None = None
    signed: bool = False  # show a plus sign
    digits: int = 1
    note: str = ""  # a footnote


@dataclass(frozen=True)
class Figure:
    """A plot. ``draw`` gets a matplotlib Axes array's figure and draws into it."""

    name: str  # of the file, without ending
    caption: str
    draw: Callable[[Any], None]  # a matplotlib Figure
    size: tuple[float, float] = (7.0, 4.0)  # inches


@dataclass(frozen=True)
class Rendered:
    name: str
    title: str
    columns: tuple[str, ...] = ()  # one a cell of a row, the label's included
    rows: tuple[tuple[Cell | str, ...], ...] = ()  # the first cell of a row is its label, a str
    notes: tuple[str, ...] = ()  # below the table: definitions, what is ours, inconsistencies of the source
    figures: tuple[Figure, ...] = ()
    findings: tuple[str, ...] = field(default=())  # sentences made by writers.held, failed, scale
    runs: tuple[tuple[str, ...], ...] = ()  # one a row: keys of the runs behind it; the page links them


class Table(Protocol):
    name: str  # of --table
    title: str
    source: str  # "CPI-FT, Table 2"

    def runs(self, preset: Preset) -> Sequence[Run]:
        """What must be there; raises ReproError when the preset has no plan for the table."""
        ...

    def render(self, preset: Preset, found: Manifests) -> Rendered: ...
