"""The CUDA sources through nvcc for every architecture CI compiles for: no GPU is needed.

No kernel spills; the full-chunk path of every step kernel moves weights, gradients and states in
16-byte accesses of global memory. `pytest -s` prints the table of registers.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from epi_kernels.kernels_report import sass
from epi_kernels.kernels_report.cuda_kernels import build_support
from python_tests import cuda_emulation

ROOT = Path(__file__).resolve().parents[1]
support = build_support()
ARCHS = ("80", "90", "100", "120")
FEW_ARCHS = (
    "80",
    "90",
)  # of the source that takes longest, whose kernels are step_codes' and a few additions
WHOLE_ARCH = "90"  # the launches' host code is compiled too; for the others device code alone
KERNELS = ("step", "step_codes", "step_corrected", "prepare", "stats", "threshold", "mask")
JOBS = [(name, arch) for name in KERNELS for arch in (FEW_ARCHS if name == "step_corrected" else ARCHS)]
NVCC = support.find_nvcc()

pytestmark = [
    pytest.mark.cuda_compile,
    pytest.mark.skipif(NVCC is None, reason="nvcc was not found"),
]


def disassembler() -> str | None:
    """cuobjdump, from the CUDA toolkit or from Triton's wheel."""
    try:
        import triton

        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        return str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    except ImportError:
        return shutil.which("cuobjdump")


@dataclass(frozen=True)
class Compiled:
    binary: Path
    log: str  # what ptxas -v says

    def resources(self) -> dict[str, tuple[int, int]]:
        """(registers, spilled bytes) of every kernel, by mangled name."""
        found = {}
        for block in self.log.split("Compiling entry function '")[1:]:
            spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", block)]
            registers = re.search(r"Used (\d+) registers", block)
            assert registers and len(spills) == 2, block
            found[block.split("'")[0]] = (int(registers[1]), sum(spills))
        return found

    def kernels(self) -> dict[str, sass.Kernel]:
        """What the disassembler makes of every kernel, by short name."""
        return {short(kernel.name): kernel for kernel in sass.read_cubin(self.binary, disassembler() or "")}


def _cached(source: Path, command: list[str], suffix: str) -> tuple[Path, str]:
    """Runs `command -o OUTPUT`, unless it ran before on the same sources; (output, messages)."""
    digest = hashlib.sha256(repr(command).encode())
    for path in [source, *sorted(ROOT.glob("csrc/math/*.h")), *sorted(ROOT.glob("csrc/cuda/*.h"))]:
        digest.update(path.read_bytes())
    output = ROOT / "build" / "cuda_compile" / f"{source.stem}-{digest.hexdigest()[:16]}{suffix}"
    log = output.with_suffix(".txt")
    output.parent.mkdir(parents=True, exist_ok=True)
    with cuda_emulation.only_one(output):  # of the test processes compiles it
        if not log.exists():
            done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
            log.write_text(done.stdout + done.stderr)
    return output, log.read_text()


def compile_kernel(name: str, arch: str) -> Compiled:
    assert NVCC is not None
    source = ROOT / "csrc" / "cuda" / f"{name}.cu"
    kind, suffix = ("-c", ".o") if arch == WHOLE_ARCH else ("-cubin", ".cubin")
    command = [
        NVCC.path,
        kind,
        f"-arch=sm_{arch}",
        *support.NVCC_FLAGS,
        "-Xptxas=-v",
        "-I",
        "csrc",
        str(source),
    ]
    return Compiled(*_cached(source, command, suffix))


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], Compiled]:
    """Every kernel source for every architecture this nvcc knows, the slowest first."""
    assert NVCC is not None
    jobs = [(name, arch) for name, arch in JOBS if not NVCC.archs or arch in NVCC.archs]
    with ThreadPoolExecutor(max(1, min(os.cpu_count() or 1, 8))) as pool:
        return dict(zip(jobs, pool.map(lambda job: compile_kernel(*job), jobs)))


def short(mangled: str) -> str:
    """step_kernel<f, t, Shared> from _ZN3epi4cuda...: t is uint16_t, a bfloat16's word."""
    match = re.search(
        r"\d+((?:[a-z]+_)+kernel)(?:I([ft]|NS0_9CorrectedE)([fth]|NS0_7NibblesE)(f|t|h|NS0_16SharedImportanceE)E)?",
        mangled,
    )
    assert match, mangled
    if match[2] is None:
        return match[1]
    weights = "Corrected" if len(match[2]) > 1 else match[2]
    state = "Nibbles" if len(match[3]) > 1 else match[3]
    return f"{match[1]}<{weights}, {state}, {'Shared' if len(match[4]) > 1 else match[4]}>"


def test_every_source_is_compiled():
    assert {path.stem for path in ROOT.glob("csrc/cuda/*.cu")} == set(KERNELS)


def test_no_kernel_spills(compiled):
    rows = [
        (arch, name, short(kernel), *figures)
        for (name, arch), unit in compiled.items()
        for kernel, figures in unit.resources().items()
    ]
    assert {arch for arch, *_ in rows} == set(ARCHS)
    kernels = sorted(
        {(name, kernel) for _, name, kernel, _, _ in rows}, key=lambda k: (KERNELS.index(k[0]), k[1])
    )
    registers = {(arch, kernel): count for arch, _, kernel, count, _ in rows}
    print(f"\nregisters, sm_: {'':26} " + "".join(f"{arch:>5}" for arch in ARCHS))
    for _, kernel in kernels:
        print(f"  {kernel:40} " + "".join(f"{registers.get((arch, kernel), '-'):>5}" for arch in ARCHS))
    assert [row for row in rows if row[-1] != 0] == []


WIDTH = {"f": 4, "t": 2, "h": 1, "Corrected": 2}


@pytest.mark.skipif(disassembler() is None, reason="no cuobjdump, neither the toolkit's nor Triton's")
@pytest.mark.parametrize("source, arch", [pair for pair in JOBS if pair[0].startswith("step")])
def test_full_chunks_move_16_bytes_at_a_time(source, arch, compiled):
    if (source, arch) not in compiled:
        pytest.skip(f"this nvcc cannot compile for sm_{arch}")
    kernels = compiled[source, arch].kernels()
    assert len(kernels) == {"step": 24, "step_codes": 28, "step_corrected": 26}[source]
    for name, kernel in kernels.items():
        param, state, importance = re.search(r"<(\w+), (\w+), (\w+)>", name).groups()
        nibbles = state == "Nibbles"  # sixteen are 8 bytes
        tensors = [param, param, *[state] * (0 if nibbles else 2), *[importance] * (importance != "Shared")]
        corrected = param == "Corrected"
        elements = 16 if corrected or nibbles else 16 // min(WIDTH[t] for t in tensors)
        accesses = sum(elements * WIDTH[t] // 16 for t in tensors)
        accesses += (2 + 1) * corrected  # of 16 bits and of 8: a thread takes one of the two ways
        assert not {i.base for i in kernel.instructions} & {"LD", "ST", "LDL", "STL"}, name
        loads, stores = (dict(sass.widths(kernel.hot_loop, base)) for base in ("LDG", "STG"))
        # beside them: the mask's bytes, the scales of codes, of 16 bits where codes have 4
        four_bit = {64, 16} if nibbles else set()
        assert loads.keys() == {128, 8} | four_bit, f"{name}: loads {loads}"
        assert stores.keys() == {128} | four_bit | ({8} if "h" in tensors else set()), (
            f"{name}: stores {stores}"
        )
        assert loads[128] % accesses == 0 == stores[128] % accesses and loads[128] and stores[128], name


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_bindings_compile_against_this_torch():
    """As setup.py compiles them for a CUDA torch; a CPU torch has every header they need."""
    include = cuda_emulation.cuda_include()
    assert include is not None, "nvcc without cuda_runtime_api.h"
    source = ROOT / "csrc" / "cuda" / "bindings_cuda.cpp"
    includes = ["-I", "csrc", *cuda_emulation.include_flags()[2:], "-I", sysconfig.get_path("include")]
    flags = [*support.CXX_FLAGS, "-Werror", "-DUSE_CUDA", "-DPy_LIMITED_API=0x030a0000", "-fPIC"]
    output, _ = _cached(source, ["g++", "-c", *flags, *includes, str(source)], ".o")
    undefined = subprocess.run(["nm", "-C", "-u", str(output)], capture_output=True, text=True).stdout
    # c10_cuda or ATen symbols would tie the library to one torch
    assert not re.search(r"\bc10::|\bat::|torch::(?!headeronly|stable)", undefined), undefined
