"""The CUDA sources, compiled by nvcc to cubins: the same table, with ptxas' own account of spills."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from epi_kernels.kernels_report.rows import Expectation, Row, make_row
from epi_kernels.kernels_report.sass import read_cubin

_ROOT = Path(__file__).resolve().parents[2]
SOURCES = _ROOT / "csrc"
_PTXAS_FUNCTION = re.compile(
    r"Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)

_STEP = re.compile(r"step(?:_stats)?_kernel<(.*)>")
_BYTES = {
    "float": 4,
    "unsigned short": 2,
    "Corrected": 2,
    "unsigned char": 1,
    "Nibbles": 0.5,
}  # the third type is none of these where the importance is shared
_CORRECTION_BYTES = 2 + 1  # of both widths: which of the two it is, is asked at run time


def sources() -> list[Path]:
    return sorted((SOURCES / "cuda").glob("*.cu"))


def build_support(root: Path = _ROOT) -> ModuleType:
    """tools/build_support.py of a source tree, which setup.py takes its flags from; it is in no package."""
    spec = importlib.util.spec_from_file_location("build_support", root / "tools" / "build_support.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def steps_recognised(found: Iterable[Row], arch: int) -> bool:
    """Whether any kernel of this architecture was known by name for a step, and so held to its expectation."""
    return any(row.arch == f"sm_{arch}" and expectation(row.kernel.split(" ", 1)[1]) for row in found)


def spills(ptxas_output: str) -> dict[str, int]:
    """Mangled kernel name -> bytes spilled, the larger of stores and loads, from ``ptxas -v``."""
    return {name: max(int(s), int(l)) for name, s, l in _PTXAS_FUNCTION.findall(ptxas_output)}


def rows(archs: Iterable[int], nvcc: str | None = None) -> list[Row]:
    """
    Raises:
        RuntimeError: there is no nvcc, there are no sources, or one does not compile; the text says which.
    """
    compiler = nvcc or shutil.which("nvcc")
    if compiler is None:
        raise RuntimeError("nvcc is not on PATH")
    if not sources():
        raise RuntimeError(f"no CUDA sources under {SOURCES}")
    tasks = [(compiler, source, arch) for source in sources() for arch in archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for part in pool.map(_compile, tasks) for row in part]


def _compile(task: tuple[str, Path, int]) -> list[Row]:
    compiler, source, arch = task
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = [compiler, "-cubin", f"-arch=sm_{arch}", *build_support().NVCC_FLAGS]
        command += ["-Xptxas", "-v", "-I", str(SOURCES), str(source), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{result.stderr.strip()}")
        kernels = read_cubin(cubin, _cuobjdump(compiler))
    spilled = spills(result.stderr + result.stdout)
    names = _demangle([kernel.name for kernel in kernels])
    found = []
    for kernel, name in zip(kernels, names, strict=True):
        row = make_row("cuda", f"{source.stem} {name}", f"sm_{arch}", kernel, expectation(name))
        n_bytes = spilled.get(kernel.name, row.spill_bytes)
        problems = [f"spills {n_bytes} bytes"] if n_bytes else []
        problems += [p for p in row.problems if not p.startswith("spills")]
        found.append(replace(row, spill_bytes=n_bytes, problems=tuple(problems)))
    return found


def expectation(name: str) -> Expectation | None:
    """Of ``step_kernel<param, state, importance>`` and ``step_stats_kernel<...>``; None for the others.

    A thread's share of a block is one access of 128 bits to the narrowest of the three types, or of a correction; 16
    elements where that would be 4-bit codes.
    """
    types = _STEP.fullmatch(name)
    if types is None:
        return None
    n_bytes = [_BYTES.get(t.strip(), 0) for t in types[1].split(",")]
    corrected = types[1].startswith("Corrected")
    elements = 16 if corrected else 16 // max(1, min(n for n in n_bytes if n))
    n_bytes.append(_CORRECTION_BYTES if corrected else 0)
    param, state, own, correction = (n * elements / 16 for n in n_bytes)
    return Expectation(
        elements,
        loads=2 * param + 2 * state + own + correction,
        stores=2 * param
        + 2 * state
        + own
        + correction,  # the unscaled gradient among them, under a run-time flag
        full_width=0.5 not in n_bytes,  # whose 16 codes are 64 bits
        # not limited: what the Triton kernels settle at compile time is a run-time switch here, so
        # the loop holds every path and its length bounds what runs from far above
    )


def _cuobjdump(nvcc: str) -> str:
    beside = Path(nvcc).resolve().parent / "cuobjdump"
    if beside.exists():
        return str(beside)
    from epi_kernels.kernels_report.triton_kernels import triton_tool

    return shutil.which("cuobjdump") or triton_tool("cuobjdump")


def _demangle(names: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    output = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout
    return [_short(line) for line in output.splitlines()]


def _short(signature: str) -> str:
    """``void ns::kernel<a, b>(args)`` -> ``kernel<a, b>``."""
    name = re.sub(r"\(anonymous namespace\)|<unnamed>", "_", signature)
    name = re.sub(r"^(void|static)\s+", "", name)
    depth = 0
    for position, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:position]
            break
    return re.sub(r"\b\w+::", "", name)
