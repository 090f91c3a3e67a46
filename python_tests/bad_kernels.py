"""Compiles kernels that the report must find fault with, and prints what it says of each, as JSON.

A program of its own, because the tests' process has Triton's interpreter on.
"""

from __future__ import annotations

import json

import triton
import triton.language as tl

from epi_kernels.backends.triton.common import LAUNCH
from epi_kernels.backends.triton.step import step_kernel
from epi_kernels.kernels_report.rows import Expectation
from epi_kernels.kernels_report.triton_kernels import catalog, compile_cubin, compile_entries, measure

ARCH = 90
SCALE = {"table": "*i64", "factor": "fp32"}


@triton.jit
def scale_kernel(table, factor, HINT: tl.constexpr):
    """x *= factor over 1024-element blocks of a tensor whose address lies in a table."""
    x = tl.load(table).to(tl.pointer_type(tl.float32))
    if HINT:
        x = tl.multiple_of(x, 16)
    offsets = tl.arange(0, 1024)
    for i in range(tl.load(table + 1).to(tl.int32)):
        tl.store(x + i * 1024 + offsets, tl.load(x + i * 1024 + offsets) * factor + 1.0)


def scaled(name: str, expected: Expectation, *, hint: bool, fused: bool = False):
    options = LAUNCH | {"enable_fp_fusion": fused}
    constants = {"HINT": hint}
    compiled = compile_cubin(scale_kernel, SCALE | {"HINT": "constexpr"}, constants, ARCH, **options)
    return measure(compiled, name, ARCH, expected)


def step(name: str, **options):
    """The float32 step; ``maxnreg`` leaves it too few registers."""
    entry = catalog()[0]
    if not options:
        return compile_entries(([entry], ARCH))[0]
    types = dict.fromkeys(("chunks", "tensors", "nonfinite"), "*i64")
    types |= dict.fromkeys(("minimum", "maximum"), "*fp32") | {"partials": "*fp64"}
    constants = dict(entry.constants)
    signature = {n: "constexpr" if n in constants else types[n] for n in step_kernel.arg_names}
    compiled = compile_cubin(step_kernel, signature, constants, ARCH, **LAUNCH, **options)
    return measure(compiled, name, ARCH, entry.expected)


def main() -> None:
    wide = Expectation(elements=8, full_width=True, loads=2, stores=2)
    rows = {
        "good": scaled("good", wide, hint=True),
        "narrow": scaled("narrow", wide, hint=False),
        "fused": scaled("fused", wide, hint=True, fused=True),
        "too few": scaled("too few", Expectation(8, loads=3, stores=2, full_width=True), hint=True),
        "too long": scaled("too long", Expectation(0.05, loads=2, max_instructions=100), hint=True),
        "good step": step("good step"),
        "spilling step": step("spilling step", maxnreg=32),
    }
    print(json.dumps({name: row.as_json() for name, row in rows.items()}))


if __name__ == "__main__":
    main()
