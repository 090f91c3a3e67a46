"""Every Triton kernel in the forms the backend launches, compiled ahead of time.

Runs in processes of its own: under TRITON_INTERPRET=1 the kernels are Python functions.
"""

from __future__ import annotations

import importlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from epi_kernels.kernels_report.cubins import read_kernels
from epi_kernels.kernels_report.rows import (
    MAX_INSTRUCTIONS,
    MAX_INSTRUCTIONS_BF16,
    MAX_INSTRUCTIONS_CORRECTION,
    MAX_INSTRUCTIONS_INT4,
    MAX_INSTRUCTIONS_INT8,
    Expectation,
    Row,
    make_row,
)
from epi_kernels.kernels_report.sass import Kernel, read_cubin
from epi_kernels.kernels_report.workers import default_jobs, in_workers

# How the backend passes every argument that is not constexpr; tensors start at multiples of 16 bytes.
_TYPES = {
    **dict.fromkeys(("chunks", "tensors", "nonfinite", "spans", "domain", "lo", "hi"), "*i64"),
    **dict.fromkeys(("bin_shifts", "histogram", "drift"), "*i64"),
    **dict.fromkeys(("minimum", "maximum", "shift", "scale", "bounds", "thresholds"), "*fp32"),
    **dict.fromkeys(("partials", "moments"), "*fp64"),
    **dict.fromkeys(("grad_scale", "found_inf"), "*fp32"),
    **dict.fromkeys(("stride", "layers", "n"), "i32"),
    "mixed_seed": "i64",
    "done": "*u8",
    "keep_factor": "fp32",
}

INEXACT = {
    "contraction": r"\b(fma|mad)\.\S*f(32|64)",
    "subnormals flushed": r"\b\w+\.\S*ftz\S*",
    "approximation": r"\b\w+\.\S*(approx|full)\S*f32",
}


@dataclass(frozen=True)
class Entry:
    """One kernel in one form."""

    name: str
    module: str  # of epi_kernels.backends.triton
    function: str
    constants: tuple[tuple[str, Any], ...]
    expected: Expectation


def catalog() -> list[Entry]:
    """What is compiled: the step in every combination of dtypes, its other switches on the pure ones, corrections of
    weights beside every kind of state and where the most registers are taken."""
    from epi_kernels.backends.triton.common import BFLOAT16, FLOAT32, INT4, INT8
    from epi_kernels.backends.triton.master import ONE_BYTE, TWO_BYTES
    from epi_kernels.backends.triton.stats import EXTREMA, NO_STATS, WITH_MOMENTS
    from epi_kernels.backends.triton.step import OWN, SHARED
    from epi_kernels.backends.triton.variants import StepVariant

    kinds = (FLOAT32, BFLOAT16, INT8)
    entries = []
    for importance in (SHARED, *(OWN + kind for kind in kinds)):
        for param in (FLOAT32, BFLOAT16):  # there are no 8-bit weights
            entries += [step_entry(StepVariant(param, state, importance, True)) for state in kinds]
    entries += [step_entry(StepVariant(param, INT4, SHARED, True)) for param in (FLOAT32, BFLOAT16)]
    for pure in (
        StepVariant(FLOAT32, FLOAT32, SHARED, True),
        StepVariant(BFLOAT16, BFLOAT16, SHARED, True),
        StepVariant(BFLOAT16, INT8, SHARED, True),
        StepVariant(BFLOAT16, INT4, SHARED, True),
    ):
        entries += [
            step_entry(pure, stats=EXTREMA),
            step_entry(pure, stats=WITH_MOMENTS),
            step_entry(pure, unscale=True),
        ]
        entries.append(step_entry(pure._replace(full=False)))
        if pure.any_rounded:
            entries.append(step_entry(pure, stochastic=False))
    # the most registers: every tensor as wide or as many as it can be
    for most in (StepVariant(FLOAT32, INT8, SHARED, True), StepVariant(FLOAT32, INT8, OWN + FLOAT32, True)):
        entries += [
            step_entry(most, stats=EXTREMA),
            step_entry(most, stats=WITH_MOMENTS),
            step_entry(most, unscale=True),
        ]
    for correction in (TWO_BYTES, ONE_BYTE):
        corrected = [StepVariant(BFLOAT16, state, SHARED, True, correction) for state in kinds]
        entries.append(step_entry(StepVariant(BFLOAT16, INT4, SHARED, True, correction)))
        corrected.append(StepVariant(BFLOAT16, INT8, OWN + FLOAT32, True, correction))
        entries += map(step_entry, corrected)
        entries.append(step_entry(corrected[3], stats=WITH_MOMENTS))
        entries.append(step_entry(corrected[1]._replace(full=False)))
    assert NO_STATS == 0
    return entries + list(_refresh())


_KIND_NAMES = ("f32", "bf16", "int8", "int4")
_KIND_BYTES = (4, 2, 1, 0.5)  # of an element


def step_entry(variant, *, stats: int = 0, unscale: bool = False, stochastic: bool = True) -> Entry:
    from epi_kernels.backends.triton.common import INT4, THREADS

    stochastic = stochastic and variant.any_rounded
    param, state, *own = variant.kinds
    importance = _KIND_NAMES[own[0]] if own else "shared"
    weights = _KIND_NAMES[param] + ("", "+16", "+8")[variant.correction]
    name = f"step {weights}/{_KIND_NAMES[state]}/{importance}"
    name += "".join(
        word
        for word, present in (
            (" bounded", not variant.full),
            (" nearest", variant.any_rounded and not stochastic),
            (" +unscale", unscale),
            (" +minmax", stats == 1),
            (" +zscore", stats == 2),
        )
        if present
    )
    elements = variant.block // THREADS
    corrections = [variant.correction] if variant.correction else []
    n_param, n_state, n_own, n_correction = (
        elements * sum(_KIND_BYTES[kind] for kind in kinds) / 16
        for kinds in ([param], [state], own, corrections)
    )
    expected = Expectation(
        elements=elements,
        full_width=variant.full and state != INT4,  # whose 16 codes are 64 bits
        loads=2 * n_param + 2 * n_state + n_own + n_correction,
        stores=(2 if unscale else 1) * n_param + 2 * n_state + n_own + n_correction,
        max_instructions=_limit(variant),
    )
    constants = {
        "PARAM": variant.param,
        "STATE": variant.state,
        "IMPORTANCE": variant.importance,
        "CORRECTION": variant.correction,
        "FULL": variant.full,
        "STOCHASTIC": stochastic,
        "SCATTERED": variant.scattered,
        "UNSCALE": unscale,
        "STATS": stats,
        "ROWS": variant.rows,
        "WIDTH": variant.width,
    }
    return Entry(name, "step", "step_kernel", tuple(constants.items()), expected)


def _limit(variant) -> int:
    from epi_kernels.backends.triton.common import FLOAT32, INT4, INT8

    if not variant.full:
        return 0
    if variant.state == INT4:
        limit = MAX_INSTRUCTIONS_INT4
    elif INT8 in variant.kinds:
        limit = MAX_INSTRUCTIONS_INT8
    else:
        limit = MAX_INSTRUCTIONS if variant.state == FLOAT32 else MAX_INSTRUCTIONS_BF16
    return limit + (MAX_INSTRUCTIONS_CORRECTION if variant.correction else 0)


def _refresh() -> Iterator[Entry]:
    from epi_kernels.backends.triton.backend import MERGE_BLOCK
    from epi_kernels.backends.triton.bounds import BOUNDS_BLOCK
    from epi_kernels.backends.triton.common import THREADS
    from epi_kernels.backends.triton.prepare import PREPARE_BLOCK
    from epi_kernels.backends.triton.stats import WIDTH
    from epi_kernels.backends.triton.variants import REFRESH_ROWS

    elements = REFRESH_ROWS * WIDTH // THREADS
    scalar = Expectation(elements=0)
    for kind, kind_name in enumerate(_KIND_NAMES):
        expected = Expectation(elements, loads=elements * _KIND_BYTES[kind] / 16)
        common = (("KIND", kind), ("FULL", True), ("ROWS", REFRESH_ROWS))
        for stats, name in ((1, "minmax"), (2, "zscore")):
            constants = (*common, ("STATS", stats))
            yield Entry(f"stats {kind_name} {name}", "stats", "stats_kernel", constants, expected)
        for hysteresis in (False, True):
            suffix = kind_name + " hysteresis" * hysteresis
            constants = (*common, ("HYSTERESIS", hysteresis))
            # blocks without an element in the bracket, nearly all, pass over most of the loop
            counted = (*constants, ("BINS", 2048))
            yield Entry(f"count {suffix}", "threshold", "count_kernel", counted, expected)
            yield Entry(f"select {suffix}", "mask", "select_kernel", constants, expected)
    prepare = (("UNSCALE", True), ("SKIPPABLE", True), ("BLOCK", PREPARE_BLOCK))
    yield Entry("prepare", "prepare", "prepare_kernel", prepare, scalar)
    tiny = (("HYSTERESIS", True), ("BLOCK", BOUNDS_BLOCK))
    yield Entry("count bounds", "bounds", "count_bounds_kernel", tiny, scalar)
    yield Entry("select bounds", "bounds", "select_bounds_kernel", (*tiny, ("POSITIVE_ONLY", True)), scalar)
    yield Entry("merge moments", "stats", "merge_moments_kernel", (("BLOCK", MERGE_BLOCK),), scalar)


def compile_cubin(function, signature: dict[str, str], constants: dict[str, Any], arch: int, **options):
    """Triton's compiled kernel for ``sm_<arch>``; pointers are taken to be aligned to 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = [i for i, name in enumerate(function.arg_names) if signature[name].startswith("*")]
    source = ASTSource(
        fn=function,
        signature={name: signature[name] for name in function.arg_names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def measure(compiled, name: str, arch: int, expected: Expectation | None) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (kernel,) = read_cubin(cubin, triton_tool("cuobjdump"))
    return _row(compiled, name, arch, expected, kernel)


def _row(compiled, name: str, arch: int, expected: Expectation | None, kernel: Kernel) -> Row:
    row = make_row("triton", name, f"sm_{arch}", kernel, expected)
    return replace(row, problems=(*row.problems, *inexact(compiled.asm["ptx"])))


def inexact(ptx: str) -> Iterator[str]:
    """What would give other bits than one IEEE-rounded operation at a time."""
    for what, pattern in INEXACT.items():
        found = re.search(pattern, ptx)
        if found:
            yield f"{what}: {found[0]}"


def triton_tool(name: str) -> str:
    """Where Triton's own cuobjdump or nvdisasm is: in every wheel, and it knows every architecture that its ptxas knows."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def compile_entries(task: tuple[Sequence[Entry], int]) -> list[Row]:
    """Of entries of the catalog, for one architecture: disassembled together."""
    entries, arch = task
    compiled = [compiled_form(module_of(entry), entry, arch) for entry in entries]
    cubins = [one.asm["cubin"] for one in compiled]
    kernels = read_kernels(cubins, arch, triton_tool("cuobjdump"), triton_tool("nvdisasm"))
    return [
        _row(one, entry.name, arch, entry.expected, kernel)
        for one, entry, kernel in zip(compiled, entries, kernels, strict=True)
    ]


def compile_form(module: ModuleType, entry: Entry, arch: int, **options) -> Row:
    """The entry's kernel as ``module`` has it; ``options`` of the compiler in place of those of a launch."""
    return measure(compiled_form(module, entry, arch, **options), entry.name, arch, entry.expected)


def module_of(entry: Entry) -> ModuleType:
    return importlib.import_module(f"epi_kernels.backends.triton.{entry.module}")


def compiled_form(module: ModuleType, entry: Entry, arch: int, **options):
    from epi_kernels.backends.triton.common import LAUNCH

    function = getattr(module, entry.function)
    constants = dict(entry.constants)
    signature = {name: "constexpr" if name in constants else _TYPES[name] for name in function.arg_names}
    return compile_cubin(function, signature, constants, arch, **(LAUNCH | options))


def rows(archs: Iterable[int], jobs: int | None = None) -> list[Row]:
    """Of every entry of the catalog, for each architecture."""
    archs, entries, jobs = tuple(archs), catalog(), jobs or default_jobs()
    tasks = [(entries[first::jobs], arch) for arch in archs for first in range(jobs)]
    found = chain(*in_workers(compile_entries, tasks, jobs))
    by_name = {(row.kernel, row.arch): row for row in found}
    return [by_name[entry.name, f"sm_{arch}"] for entry in entries for arch in archs]
