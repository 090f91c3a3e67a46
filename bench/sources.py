"""What the kernels behind a figure were made from: a hash of their sources and compiler flags.

A record carries it, so that a table can say whether the kernels are still those that were measured, without asking git.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epi_kernels.kernels_report.cuda_kernels import build_support

ROOT = Path(__file__).resolve().parents[1]
KERNEL_FILES = {
    "cpu": (
        "csrc/*.cpp",
        "csrc/*.h",
        "csrc/math/*.h",
        "csrc/cpu/*",
        "epi_kernels/backends/cpu.py",
        "epi_kernels/backends/table.py",
    ),
    "cuda": (
        "csrc/math/*.h",
        "csrc/cuda/*",
        "epi_kernels/backends/cuda.py",
        "epi_kernels/backends/table.py",
        "epi_kernels/backends/triton/*.py",
    ),
}


def kernel_hash(root: Path = ROOT, device: str = "cuda") -> str:
    """Of every file and every compiler flag that decides what runs on a device of this type.

    Not of the list of architectures: a new one does not change the code of those that ran.
    """
    build = build_support(root)
    flags = build.cuda_flags(archs=["90"]) if device == "cuda" else build.CXX_FLAGS
    digest = hashlib.sha256(json.dumps(flags).encode())
    patterns = KERNEL_FILES[device]
    for path in sorted(path for pattern in patterns for path in root.glob(pattern) if path.is_file()):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def kernel_hashes(root: Path = ROOT) -> dict[str, str]:
    return {device: kernel_hash(root, device) for device in KERNEL_FILES}


def changed_since(record: Mapping[str, Any], device: str, root: Path = ROOT) -> str:
    """What a caption adds to the commit of a record: nothing where the kernels are those that were measured."""
    recorded = record.get("kernels", {}).get(device)
    if recorded is None:
        return "; whether the kernels have changed since was not recorded"
    return "" if recorded == kernel_hash(root, device) else "; **the kernels have changed since**"
