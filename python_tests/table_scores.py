"""Scores of made-up runs for the tables' tests, and the rows and findings that a table makes of them."""

from __future__ import annotations

from epi_kernels.repro.methods.config import Epi, Full, Static
from epi_kernels.repro.runs import CpiFt, Interpolate, Run, Train
from epi_kernels.repro.tables import TABLES
from epi_kernels.repro.tables.base import Cell, Rendered
from python_tests.repro_fakes import FULL_MARK, make_preset, manifests


def sequential(gain: dict[int, float], static: float = 5.0):
    """Scores of two tasks in sequence, in percent: full SFT goes through (B 40, A 60) and (B 80, A 20), WiSE-FT through
    (30, 75) and (60, 50); EPI is at B = 60, `gain` above A = 40, and so is the static mask."""

    def score(run: Run, kind: str) -> float:
        percent = 50.0
        if isinstance(run, Train) and isinstance(run.before, Train):
            first = run.before.tasks[0].kind
            match run.method:
                case Full():
                    a, b = (20.0, 80.0) if run.recipe.lr == 1e-3 else (60.0, 40.0)
                case Epi():
                    a, b = 40.0 + gain.get(run.seed, 0.0), 60.0
                case Static():
                    a, b = 40.0 + static, 60.0
                case _:
                    a, b = 40.0, 60.0
            percent = a if kind == first else b
        elif isinstance(run, Interpolate):
            first = run.before.tasks[0].kind
            a, b = (50.0, 60.0) if run.after.recipe.lr == 1e-3 else (75.0, 30.0)
            percent = a if kind == first else b
        elif isinstance(run, Train):
            percent = 90.0 if kind == run.tasks[0].kind else 10.0
        return percent * FULL_MARK.get(kind, 100.0) / 100

    return score


def mixture_score(run: Run, kind: str) -> float:
    """sums 50 of 100, strings 7 of 10, topics 60 of 100; CPI-FT's sums lower by 9 and a seed's worth."""
    score = {"sums": 50.0, "strings": 7.0, "topics": 60.0}.get(kind, 0.0)
    return score - (9.0 + run.seed if isinstance(run, CpiFt) and kind == "sums" else 0.0)


def rendered(name: str, score, **changes) -> Rendered:
    preset = make_preset(**changes)
    return TABLES[name].render(preset, manifests(TABLES[name], preset, score))


def cells(table: Rendered, *labels: str) -> dict[str, Cell | str]:
    """The row that begins with these labels, by column."""
    (row,) = [row for row in table.rows if row[: len(labels)] == labels]
    return dict(zip(table.columns, row))


def finding(table: Rendered, start: str) -> str:
    (found,) = [
        one for one in table.findings if one.partition(": ")[2].startswith(start) or one.startswith(start)
    ]
    return found


WIN = {1: 12.0, 2: 15.0, 3: 18.0}  # mean 15, sd 3; t of 2 degrees of freedom 4.3027: half width 7.45
