"""What every row of the tables took, from the runs that stand behind it."""

from __future__ import annotations

from collections.abc import Sequence

from epi_kernels import published
from epi_kernels.repro.tables.base import Cell, Manifests, Rendered
from epi_kernels.repro.tables.cost import Cost, peak_note, peak_of, peaks_of, state_of, step_of, training_of

NAME = "costs"
SOURCE = "EPI, limitations: the memory of a per-parameter average"
LEAVES_OUT = ("memory",)  # shows them itself


def costs(tables: Sequence[Rendered], manifests: Manifests) -> Rendered | None:
    """None where no row has runs that kept bytes or times."""
    listed = [
        (f"{table.name}: {_label(row)}", keys)
        for table in tables
        if table.name not in LEAVES_OUT
        for row, keys in zip(table.rows, table.runs)
    ]
    found, seen = [], set()
    for label, keys in listed:
        if frozenset(keys) in seen:
            continue
        seen.add(frozenset(keys))
        runs = [Cost.of([manifests[key]]) for key in dict.fromkeys(keys) if key in manifests]
        trained = [one for one in runs if one.bytes or one.time]
        if trained:
            found.append((label, keys, trained))
    if not found:
        return None
    peaks = peaks_of(one for _, _, of_row in found for one in of_row)
    above = all(one.before is not None for one in peaks)
    rows = [
        (
            label,
            _cell(size := state_of(of_row), 3),
            _cell([100 * one / published.STATE_TOTAL_BYTES for one in size], 0),
            _cell(peak_of(of_row, above), 1 if above else 0),
            _cell(step_of(of_row), 3),
            _cell(training_of(of_row), 2),
        )
        for label, _, of_row in found
    ]
    return Rendered(
        name=NAME,
        title="What the rows of all tables took",
        columns=(
            "table: row",
            "state, bytes/parameter",
            "state, of published, %",
            "peak, MiB",
            "optimizer step, ms",
            "training step, ms",
        ),
        rows=tuple(rows),
        runs=tuple(keys for _, keys, _ in found),
        notes=(
            "Of the runs behind a row that trained, each counted once: over seeds, and over tasks or shares of data where a row"
            " has several; a row of the same runs as one above is not repeated. State: what the optimizer and the method keep. A"
            " cell is empty where some run kept no figure.",
            f"Published: {published.STATE_TOTAL_BYTES} bytes a parameter by EPI's description. The table memory has steps beside an arm"
            " of it.",
            *peak_note(peaks, above),
        ),
    )


def _label(row: Sequence[Cell | str]) -> str:
    """The cells that name it: the first, and what else is plain words before the numbers."""
    words = []
    for cell in row:
        if not isinstance(cell, str):
            break
        words.append(cell)
    return ", ".join(word for word in words if word)


def _cell(values: Sequence[float], digits: int) -> Cell | str:
    return Cell(values=tuple(values), digits=digits) if values else ""
