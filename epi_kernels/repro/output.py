"""From manifests to what people read: tables in three formats, plots, one page, and one file to commit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from epi_kernels.repro.bundle import bundle, write_bundle
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.manifest import Manifest
from epi_kernels.repro.page import write_page
from epi_kernels.repro.preset import Preset
from epi_kernels.repro.store import Store
from epi_kernels.repro.sweep import Plan
from epi_kernels.repro.tables import TABLES
from epi_kernels.repro.tables.base import Rendered
from epi_kernels.repro.tables.costs import SOURCE, costs
from epi_kernels.repro.writers import write_tables

PAGE, TABLES_FOLDER, RESULTS = "index.html", "tables", "results.json"
SERIES = ("conflict", "drift", "stability")  # what tables read; the course of every run stays in its manifest


def render(preset: Preset, manifests: Mapping[str, Manifest], names: Iterable[str]) -> list[Rendered]:
    """The tables of these names. Raises ReproError when a run is missing."""
    return [TABLES[name].render(preset, manifests) for name in names]


def planned(preset: Preset, names: Iterable[str]) -> Plan:
    """All runs of these tables. Raises ReproError where the preset has no plan for one."""
    return Plan.of(run for name in names for run in TABLES[name].runs(preset))


def with_earlier(out: Path, preset: Preset, names: Iterable[str], store: Store) -> list[str]:
    """The names of these tables after those that `out`/results.json holds already, as far as the preset still plans
    them and their runs are there: a table more does not take the others from the page."""
    try:
        earlier = [name for name in json.loads((out / RESULTS).read_bytes())["tables"] if name in TABLES]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or not a file of ours
        earlier = []
    return list(dict.fromkeys([*(one for one in earlier if _whole(preset, one, store)), *names]))


def _whole(preset: Preset, name: str, store: Store) -> bool:
    try:
        return all(store.finished(run, with_weights=False) for run in TABLES[name].runs(preset))
    except ReproError:
        return False


def write(
    out: Path, preset: Preset, names: Iterable[str], manifests: Mapping[str, Manifest], command: str
) -> None:
    """`out`/index.html, `out`/tables/ and `out`/results.json: the manifests in one file, from which
    `bench/results/reproduce-PRESET.json` and with it the README's tables are made."""
    names = list(names)
    rendered = render(preset, manifests, names)
    sources = {name: TABLES[name].source for name in names}
    if (of_rows := costs(rendered, manifests)) is not None:
        rendered.append(of_rows)
        sources[of_rows.name] = SOURCE
    write_tables(out / TABLES_FOLDER, rendered)
    write_bundle(bundle(preset, names, manifests, SERIES), out / RESULTS)
    write_page(out / PAGE, rendered, manifests, preset, sources, command)
