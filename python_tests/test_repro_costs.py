"""Bytes, peaks and times of the rows of all tables: those of the runs behind them."""

from __future__ import annotations

import csv

from repro_fakes import make_preset
from repro_fakes import manifest as made_up

from epi_kernels.repro import output
from epi_kernels.repro.methods.config import Epi, Full, Method
from epi_kernels.repro.runs import Interpolate, key
from epi_kernels.repro.tables import TABLES
from epi_kernels.repro.tables.base import Cell, Rendered
from epi_kernels.repro.tables.costs import costs
from python_tests.repro_tables import SEEDS, SUMS, stage_b

ARMS: dict[str, Method] = {"full": Full(), "epi": Epi(ratio=0.2)}
KEYS = {name: tuple(key(stage_b(method, seed)) for seed in SEEDS) for name, method in ARMS.items()}
LAST = stage_b(Full(), 1)
HALFWAY = Interpolate(before=LAST.before, after=LAST, alpha=0.5, evaluate=(SUMS,))
FOUND = {
    key(run): made_up(run, {"sums": 1.0})
    for run in [HALFWAY, *(stage_b(method, seed) for method in ARMS.values() for seed in SEEDS)]
}


def table(name: str, rows: dict[tuple[str, ...], tuple[str, ...]]) -> Rendered:
    cells = tuple((*label, Cell((1.0,))) for label in rows)
    return Rendered(name, name, ("a", "b", "c"), cells, runs=tuple(rows.values()))


def test_a_row_has_the_figures_of_its_runs():
    rendered = [
        table("main", {("A → B", "full"): KEYS["full"], ("A → B", "epi"): KEYS["epi"]}),
        table("memory", {("A → B", "epi"): KEYS["epi"][:1]}),
    ]
    found = costs(rendered, FOUND)
    assert found is not None
    full, epi = found.rows
    assert full[0] == "main: A → B, full" and epi[0] == "main: A → B, epi"
    # in the order of the columns: 813 bytes of 100 parameters, of 13 each; a peak of 1 MiB; 1.01, 1.02, 1.03 ms and 9 ms
    assert [cell.values for cell in epi[1:]] == [
        (8.13,) * 3,
        (100 * 8.13 / 13,) * 3,
        (1.0,) * 3,
        (1.01, 1.02, 1.03),
        (9.0,) * 3,
    ]
    assert full[1].values == (8.0,) * 3
    assert found.runs == (KEYS["full"], KEYS["epi"]), "the page links them"


def test_the_same_runs_are_told_once_and_what_did_not_train_not_at_all():
    rows = {("epi",): KEYS["epi"], ("epi, by kind",): KEYS["epi"][::-1], ("halfway",): (key(HALFWAY),)}
    found = costs([table("drift", rows)], FOUND)
    assert found is not None and [row[0] for row in found.rows] == ["drift: epi"]
    assert costs([table("frontier", {("halfway",): (key(HALFWAY),)})], FOUND) is None


def test_a_figure_that_one_run_lacks_is_left_empty():
    without = {one: manifest.model_copy(update={"time": None}) for one, manifest in FOUND.items()}
    mixed = FOUND | {KEYS["epi"][0]: without[KEYS["epi"][0]]}
    found = costs([table("main", {("epi",): KEYS["epi"]})], mixed)
    assert found is not None
    (row,) = found.rows
    assert row[4:] == ("", "") and row[1].values == (8.13,) * 3


def test_what_is_written_has_them_after_the_tables(tmp_path):
    preset = make_preset()
    name = "epi-main"
    found = {key(run): made_up(run, dict.fromkeys(preset.tasks, 1.0)) for run in TABLES[name].runs(preset)}
    output.write(tmp_path, preset, [name], found, "make reproduce")
    assert 'id="table-costs"' in (tmp_path / "index.html").read_text()
    with (tmp_path / "tables" / "tables.csv").open() as file:
        told = {row["row"] for row in csv.DictReader(file) if row["table"] == "costs"}
    rows = TABLES[name].render(preset, found).rows
    assert len(told) == len(rows) and all(one.startswith(f"{name}: ") for one in told)
