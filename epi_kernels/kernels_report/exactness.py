"""What exactness costs: the low-bit steps as they are shipped, and with one exactness after another given up.

The forms that give one up lie in no package and no launch can reach them: the text of step.py, with its calls
replaced, becomes a module in a temporary folder, in a process that compiles ahead of time and ends. Another text
has another key in Triton's cache, too.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from epi_kernels.kernels_report import triton_kernels
from epi_kernels.kernels_report.workers import in_workers
from epi_kernels.markdown import table

DIVISION = ("tl.div_rn(", "tl.fdiv(")
ROOT = ("tl.sqrt_rn(", "tl.sqrt(")


@dataclass(frozen=True)
class Form:
    """A step as it would be without something."""

    given_up: str  # "" is the step as shipped
    calls: tuple[tuple[str, str], ...] = ()  # of step.py: an exact one, what takes its place
    contracted: bool = False  # a product and a sum may be rounded once


FORMS = (
    Form(""),
    Form("rounded division", (DIVISION,)),
    Form("rounded root", (ROOT,)),
    Form("rounded division and root", (DIVISION, ROOT)),
    Form("a rounding for each product and sum", contracted=True),
    Form("all three", (DIVISION, ROOT), contracted=True),
)
STATES, ROUNDINGS = ("int8", "bf16"), ("stochastic", "nearest")


@dataclass(frozen=True)
class Cost:
    """Of a step over bfloat16 weights whose importance is exp_avg_sq."""

    states: str  # of STATES
    rounding: str  # of ROUNDINGS
    given_up: str  # of FORMS
    arch: str
    instructions_per_element: float
    common_instructions_per_element: float  # of them, without the slow cases of a division or root
    registers: int
    spill_bytes: int
    inexact: tuple[str, ...]  # what the check of a shipped kernel says of it

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def rewritten(source: Path, calls: Sequence[tuple[str, str]], folder: Path) -> ModuleType:
    """A module of ``source``'s text with calls replaced, under a name that no import statement gives.

    Raises:
        RuntimeError: a call that was to be replaced is not there just once.
    """
    text = source.read_text()
    for exact, other in calls:
        if text.count(exact) != 1:
            raise RuntimeError(f"{source.name} has {exact}...) {text.count(exact)} times; 1 was expected")
        text = text.replace(exact, other)
    path = folder / f"approximate_{source.name}"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"epi_kernels_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and inspect look for it
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def cost(task: tuple[str, str, Form, int]) -> Cost:
    """Compiles one form of one step."""
    from epi_kernels.backends.triton import step
    from epi_kernels.backends.triton.common import BFLOAT16, INT8
    from epi_kernels.backends.triton.variants import StepVariant

    states, rounding, form, arch = task
    variant = StepVariant(BFLOAT16, INT8 if states == "int8" else BFLOAT16, step.SHARED, True)
    entry = triton_kernels.step_entry(variant, stochastic=rounding == "stochastic")
    with tempfile.TemporaryDirectory() as folder:
        assert step.__file__ is not None
        module = rewritten(Path(step.__file__), form.calls, Path(folder)) if form.calls else step
        row = triton_kernels.compile_form(module, entry, arch, enable_fp_fusion=form.contracted)
    each, common = row.instructions_per_element, row.common_instructions_per_element
    if each is None or common is None:
        raise RuntimeError(f"{entry.name}: no loop over elements was found")
    inexact = tuple(p for p in row.problems if p.startswith(tuple(triton_kernels.INEXACT)))
    return Cost(
        states, rounding, form.given_up, row.arch, each, common, row.registers, row.spill_bytes, inexact
    )


def costs(
    archs: Iterable[int],
    jobs: int | None = None,
    forms: Sequence[Form] = FORMS,
    kernels: Sequence[tuple[str, str]] = tuple((s, r) for s in STATES for r in ROUNDINGS),
) -> list[Cost]:
    """Of every form of every step, in the order of the table's lines; ``kernels``: states and rounding."""
    tasks = [(*kernel, form, arch) for arch in archs for form in forms for kernel in kernels]
    return in_workers(cost, tasks, jobs)


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """A table an architecture of ``Cost.as_json`` rows: a line a form, a column a step."""
    return "\n\n".join(
        _table(arch, [row for row in found if row["arch"] == arch])
        for arch in dict.fromkeys(row["arch"] for row in found)
    )


def _table(arch: str, found: Sequence[dict[str, Any]]) -> str:
    cells = {(row["given_up"], (row["states"], row["rounding"])): row for row in found}
    kernels = list(dict.fromkeys(kernel for _, kernel in cells))
    forms = list(dict.fromkeys(form for form, _ in cells))
    lines = []
    for form in forms:
        line = [form or "nothing, as shipped"]
        for kernel in kernels:
            each = cells[form, kernel]["instructions_per_element"]
            saved = each - cells["", kernel]["instructions_per_element"]
            line.append(f"{each:.1f} ({saved:+.1f})" if form else f"**{each:.1f}**")
        lines.append(line)
    for form in (forms[0], forms[-1]):
        title = f"{form or 'nothing'}, slow cases left out"
        common = (cells[form, kernel]["common_instructions_per_element"] for kernel in kernels)
        lines.append([title, *(f"{each:.1f}" for each in common)])
    titles = {"int8": "8-bit states", "bf16": "bfloat16 states"}
    header = [f"given up ({arch})", *(f"{titles[states]}, {rounding}" for states, rounding in kernels)]
    return table(header, lines, "l" + "r" * len(kernels))
