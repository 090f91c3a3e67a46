"""What setup.py decides: which compiler, which flags, whether the CUDA part is built and why.

Pure functions of their arguments, so that python_tests/test_packaging.py can ask them about
machines other than this one. Needs neither torch nor the package.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The stable ABI of torch 2.10: a library built with any later torch loads in 2.10 and up.
TORCH_TARGET_VERSION = "0x020a000000000000"
MIN_TORCH = (2, 10)

# Turing to Blackwell; the last one is also kept as PTX for what comes later.
CUDA_ARCHS = ("75", "80", "86", "89", "90", "100", "120")

# Contraction would fuse a*b+c into one rounding and break bit equality between backends.
# -fno-math-errno and -fno-trapping-math change no result: they free the vectoriser from errno
# and from the order of floating-point exception flags.
CXX_FLAGS = (
    "-O3",
    "-std=c++20",
    "-Wall",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
)
NVCC_FLAGS = (
    "-O3",
    "-std=c++20",
    "-fmad=false",
    "-prec-div=true",
    "-prec-sqrt=true",
    "-ftz=false",
    "-lineinfo",
    "-DUSE_CUDA",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    "-Xcompiler=-ffp-contract=off,-fvisibility=hidden",
)

MISSING_TORCH = """
epi-kernels compiles a C++ extension against the torch that is installed, and torch cannot be
imported here. Two usual causes:

  torch is not installed yet:         pip install torch
  pip builds in an isolated place     pip install --no-build-isolation .
  that does not see your torch:       (needs: pip install setuptools wheel ninja)

`make test` and `make demo` do all of this in a virtual environment of their own.
"""


@dataclass(frozen=True)
class Nvcc:
    path: str
    home: str  # the toolkit's root, with include/ and lib64/
    version: str  # "13.0"
    archs: tuple[str, ...]  # compute capabilities this nvcc can compile for; empty: unknown


@dataclass(frozen=True)
class CudaChoice:
    build: bool
    reason: str
    archs: tuple[str, ...] = ()


class BuildError(RuntimeError):
    """The extension cannot be built; the message says why and what to do."""


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def find_nvcc(
    environ: Mapping[str, str] = os.environ,
    which: Callable[[str], str | None] = shutil.which,
    output: Callable[[Sequence[str]], str] = _output,
) -> Nvcc | None:
    """The nvcc of CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda, in this order."""
    homes = [environ.get("CUDA_HOME"), environ.get("CUDA_PATH")]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    candidates += [which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    for path in candidates:
        if not path or not os.path.exists(path):
            continue
        release = re.search(r"release (\d+\.\d+)", output([path, "--version"]))
        if release is None:
            continue
        # nvcc on PATH may be a link or a wrapper: ask nvcc itself where its toolkit lies.
        here = re.search(r"_HERE_=(\S+)", output([path, "--dryrun", "-c", "-x", "cu", "none.cu"]))
        bin_dir = here.group(1) if here else os.path.dirname(os.path.realpath(path))
        archs = re.findall(r"sm_(\d+)\b", output([path, "--list-gpu-code"]))
        return Nvcc(path, os.path.dirname(os.path.normpath(bin_dir)), release.group(1), tuple(archs))
    return None


def choose_archs(
    requested: str, nvcc: Nvcc, device_archs: Callable[[], Sequence[str]] = lambda: ()
) -> tuple[str, ...]:
    """EPI_KERNELS_CUDA_ARCHS: "" all of ours, "native" the devices here, or "80,90"."""
    if requested == "native":
        found = tuple(sorted(set(device_archs()), key=int))
        if found:
            return found
        requested = ""
    if requested:
        archs = tuple(re.split(r"[,; ]+", requested.strip()))
        for arch in archs:
            if not arch.isdigit():
                raise BuildError(
                    f"EPI_KERNELS_CUDA_ARCHS={requested!r}: expected compute capabilities "
                    "without a dot, such as '80,90', or 'native'"
                )
            if nvcc.archs and arch not in nvcc.archs:
                raise BuildError(f"nvcc {nvcc.version} cannot compile for sm_{arch}")
        return archs
    return tuple(a for a in CUDA_ARCHS if not nvcc.archs or a in nvcc.archs)


def gencode_flags(archs: Sequence[str]) -> list[str]:
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    last = archs[-1]
    return [*flags, f"-gencode=arch=compute_{last},code=compute_{last}"]


def cuda_flags(archs: Sequence[str]) -> dict[str, list[str]]:
    """What compiles the CUDA library: "cxx" its bindings, "nvcc" the rest."""
    return {"cxx": [*CXX_FLAGS, "-DUSE_CUDA"], "nvcc": [*NVCC_FLAGS, *gencode_flags(archs)]}


def choose_cuda(
    torch_cuda: str | None,
    nvcc: Nvcc | None,
    has_sources: bool,
    environ: Mapping[str, str] = os.environ,
    device_archs: Callable[[], Sequence[str]] = lambda: (),
) -> CudaChoice:
    """Whether the CUDA library is built, and why.

    `EPI_KERNELS_BUILD_CUDA`: "auto" (default) builds it where that can work; "0" never;
    "1" raises BuildError where it cannot.
    """
    wanted = environ.get("EPI_KERNELS_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise BuildError(f"EPI_KERNELS_BUILD_CUDA={wanted!r}: expected auto, 0 or 1")
    if wanted == "0":
        return CudaChoice(False, "not built: EPI_KERNELS_BUILD_CUDA=0")
    problem = None
    if not has_sources:
        problem = "this source tree has no CUDA sources"
    elif torch_cuda is None:
        problem = "the torch it was built with has no CUDA"
    elif nvcc is None:
        problem = f"nvcc was not found (torch is built for CUDA {torch_cuda})"
    elif nvcc.version.split(".")[0] != torch_cuda.split(".")[0]:
        problem = (
            f"nvcc {nvcc.version} is of another major version than torch's CUDA {torch_cuda}; "
            f"install CUDA {torch_cuda.split('.')[0]} or set CUDA_HOME to it"
        )
    if problem is not None or nvcc is None:
        if wanted == "1":
            raise BuildError(f"EPI_KERNELS_BUILD_CUDA=1, but {problem}")
        return CudaChoice(False, f"not built: {problem}")
    archs = choose_archs(environ.get("EPI_KERNELS_CUDA_ARCHS", ""), nvcc, device_archs)
    return CudaChoice(True, f"built with nvcc {nvcc.version} for torch's CUDA {torch_cuda}", archs)


def choose_cxx(
    environ: Mapping[str, str],
    python_cxx: str | None,
    which: Callable[[str], str | None] = shutil.which,
) -> str:
    """The C++ compiler: CXX, the one Python was built with, else c++, g++ or clang++."""
    if environ.get("CXX"):
        return environ["CXX"]
    for command in (python_cxx or "", "c++", "g++", "clang++"):
        if command and which(command.split()[0]):
            return command
    raise BuildError(
        "no C++ compiler was found. Debian, Ubuntu: sudo apt-get install g++; "
        "Fedora: sudo dnf install gcc-c++; macOS: xcode-select --install"
    )


def cxx_version(command: str, output: Callable[[Sequence[str]], str] = _output) -> str:
    """First line of `--version`: the compiler's name and release."""
    lines = output([*command.split(), "--version"]).splitlines()
    return lines[0].strip() if lines else command


def cpu_sources(root: Path) -> list[str]:
    """Relative paths, as setuptools wants them."""
    found = [*root.glob("csrc/*.cpp"), *root.glob("csrc/cpu/**/*.cpp")]
    return sorted(path.relative_to(root).as_posix() for path in found)


def cuda_sources(root: Path) -> list[str]:
    found = [*root.glob("csrc/cuda/**/*.cu"), *root.glob("csrc/cuda/**/*.cpp")]
    return sorted(path.relative_to(root).as_posix() for path in found)


def check_objects(sources: Sequence[str]) -> None:
    """Refuses step.cu beside step.cpp: both would compile to step.o, and one would be lost."""
    seen: dict[str, str] = {}
    for source in sources:
        other = seen.setdefault(os.path.splitext(source)[0], source)
        if other != source:
            raise BuildError(f"{other} and {source} compile to the same object file: rename one")


def headers(root: Path) -> list[str]:
    return sorted(
        path.relative_to(root).as_posix()
        for suffix in ("h", "cuh", "hpp", "inc")
        for path in root.glob(f"csrc/**/*.{suffix}")
    )
