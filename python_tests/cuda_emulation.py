"""The CUDA backend without a GPU: its kernel bodies and bindings compiled for the CPU.

Everything but the launches and the GPU's own intrinsics is the code that runs on a device: the plan
of the work, the tables, the schemas and checks, the bodies of all kernels with their shared memory
and barriers. What is left to a device: vector instructions, the memory model, speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch
from torch.utils import cpp_extension

from epi_kernels.backends.cuda import CudaBackend, Plans

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("python_tests/cuda_emulation.cpp", "csrc/cuda/bindings_cuda.cpp")
LIBRARY = "epi_kernels_emulation"
FLAGS = (
    "-std=c++20",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
    "-pthread",
    "-fPIC",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DEPI_CUDA_EMULATION",
    f"-DEPI_CUDA_LIBRARY={LIBRARY}",
    "-DEPI_CUDA_KEY=CPU",
)


def cuda_include() -> str | None:
    """The folder of cuda_runtime_api.h, from the toolkit of nvcc."""
    candidates = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        dry = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", "none.cu"], capture_output=True, text=True)
        for line in dry.stderr.splitlines():
            if "_HERE_=" in line:
                candidates.append(os.path.dirname(line.split("_HERE_=")[1].strip()))
    for home in candidates:
        include = os.path.join(home, "include")
        if home and os.path.exists(os.path.join(include, "cuda_runtime_api.h")):
            return include
    return None


def include_flags() -> list[str]:
    folders = [str(ROOT / "csrc"), *cpp_extension.include_paths(), sysconfig.get_path("include")]
    folders += [include] if (include := cuda_include()) else []
    return [flag for folder in folders for flag in ("-isystem" if "csrc" not in folder else "-I", folder)]


def missing() -> str | None:
    """Why the emulation cannot be built here."""
    if shutil.which("g++") is None:
        return "no g++"
    if cuda_include() is None:
        return "no CUDA toolkit headers"
    return None


@contextlib.contextmanager
def only_one(output: Path):
    """Of several test processes that want to build this file, one at a time."""
    with open(output.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def build(*extra: str) -> Path:
    """The shared library, compiled anew when a source, a header or a flag has changed."""
    headers = sorted([*ROOT.glob("csrc/math/*.h"), *ROOT.glob("csrc/cuda/*.h")])
    digest = hashlib.sha256(repr((FLAGS, extra, torch.__version__)).encode())
    for path in [*headers, *(ROOT / source for source in SOURCES)]:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_emulation"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"emulation-{digest.hexdigest()[:16]}.so"
    with only_one(library):
        if not library.exists():
            objects, processes = [], []
            for source in SOURCES:
                objects.append(library.with_suffix(f".{Path(source).stem}.o"))
                command = [
                    "g++",
                    "-c",
                    *FLAGS,
                    *extra,
                    *include_flags(),
                    str(ROOT / source),
                    "-o",
                    str(objects[-1]),
                ]
                processes.append(
                    subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                )
            for process in processes:
                output, _ = process.communicate()
                assert process.returncode == 0, output
            torch_lib = os.path.join(os.path.dirname(torch.__file__), "lib")
            fresh = library.with_suffix(f".{os.getpid()}.so")
            subprocess.run(
                [
                    "g++",
                    "-shared",
                    *extra,
                    *map(str, objects),
                    "-L",
                    torch_lib,
                    "-ltorch_cpu",
                    "-ltorch",
                    "-lc10",
                ]
                + [f"-Wl,-rpath,{torch_lib}", "-pthread", "-o", str(fresh)],
                check=True,
            )
            fresh.replace(library)
            for path in objects:
                path.unlink()
    return library


@functools.cache
def load() -> ctypes.CDLL:
    path = str(build())
    torch.ops.load_library(path)
    return ctypes.CDLL(path)


class EmulatedCudaBackend(CudaBackend):
    """CudaBackend over CPU tensors. ``threads``: of a block."""

    description = "csrc/cuda played by the CPU, for tests"

    def __init__(self, threads: int = 8) -> None:
        load().emulate_threads(threads)
        self._ops = getattr(torch.ops, LIBRARY)
        self._plans = Plans()

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
            return None
        return f"the emulation has no {dtype} path on {device.type}"
