"""`epi-kernels env`: what a bug report needs.

Everything is asked of the machine as it is, and nothing that fails to answer stops the rest.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import epi_kernels


class Variable(NamedTuple):
    default: str
    meaning: str


# Every EPI_KERNELS_* variable the project reads; a test compares this table with the sources.
ENVIRONMENT_VARIABLES = {
    "EPI_KERNELS_BUILD_CUDA": Variable(
        "auto", "at build time: 0 leaves the CUDA part out, 1 fails where it cannot be built"
    ),
    "EPI_KERNELS_CPU_ISA": Variable(
        "", "instruction set of the cpu backend: avx512, avx2 or plain; empty: the widest there is"
    ),
    "EPI_KERNELS_CUDA_ARCHS": Variable(
        "", "at build time: '80,90', 'native' (the devices here); empty: all supported"
    ),
}

PREFIX = "EPI_KERNELS_"
PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors")


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _command_output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _cpu_model() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    match = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _cpu_capability() -> str:
    """The instruction set the cpu backend chooses here."""
    try:
        import torch

        importlib.import_module("epi_kernels._C")
        return torch.ops.epi_kernels.cpu_capability()
    except Exception as error:
        return f"unknown: {type(error).__name__}: {error}"


def _build_info() -> dict[str, Any] | None:
    """What setup.py decided when the extension was built."""
    try:
        return json.loads((Path(__file__).parent / "_build_info.json").read_text())
    except (OSError, ValueError):
        return None


def _devices() -> dict[str, Any]:
    devices: dict[str, Any] = {
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "isa": _cpu_capability()},
        "cuda": [],
    }
    try:
        import torch

        devices["cpu"]["threads"] = torch.get_num_threads()
        devices["torch_cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                device = torch.cuda.get_device_properties(index)
                devices["cuda"].append(
                    {
                        "name": device.name,
                        "capability": f"{device.major}.{device.minor}",
                        "memory_gib": round(device.total_memory / 2**30, 1),
                    }
                )
    except Exception as error:
        devices["error"] = f"{type(error).__name__}: {error}"
    return devices


def _backends() -> list[dict[str, Any]]:
    try:
        from epi_kernels import backends

        return [
            {"name": name, "available": ok, "reason": reason} for name, ok, reason in backends.available()
        ]
    except Exception as error:
        reason = f"could not be asked: {type(error).__name__}: {error}"
        return [{"name": "all", "available": False, "reason": reason}]


def _toolchain() -> dict[str, str | None]:
    nvcc = re.search(r"release (\d+\.\d+)", _command_output("nvcc", "--version"))
    driver = _command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "nvcc": nvcc.group(1) if nvcc else None,
        "driver": driver.splitlines()[0].strip() if driver.strip() else None,
    }


def report() -> dict[str, Any]:
    """The whole report, ready for JSON."""
    return {
        "epi_kernels": epi_kernels.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _package_version(name) for name in PACKAGES},
        "build": _build_info(),
        "toolchain": _toolchain(),
        "devices": _devices(),
        "backends": _backends(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIX)},
    }


def _build_lines(build: dict[str, Any] | None) -> list[tuple[str, str]]:
    if build is None:
        return [("extension", "not built: epi_kernels/_build_info.json is missing (make build)")]
    return [
        (
            "extension",
            f"{build['cxx_version']}, against torch {build['torch']} on {build['platform']}",
        ),
        ("cuda part", build["cuda"]["reason"]),
    ]


def format_report(facts: dict[str, Any]) -> str:
    """The report as aligned text."""
    cpu = facts["devices"]["cpu"]
    versions = [("epi-kernels", facts["epi_kernels"]), ("python", facts["python"])]
    versions += [(name, version or "not installed") for name, version in facts["packages"].items()]
    versions += _build_lines(facts["build"])
    versions += [(name, value or "not found") for name, value in facts["toolchain"].items()]
    threads = f", {cpu['threads']} threads" if "threads" in cpu else ""
    devices = [("cpu", f"{cpu['model']}, {cpu['cores']} cores{threads}, kernels: {cpu['isa']}")]
    devices += [
        (f"cuda:{i}", f"{d['name']}, sm_{d['capability'].replace('.', '')}, {d['memory_gib']} GiB")
        for i, d in enumerate(facts["devices"]["cuda"])
    ]
    if not facts["devices"]["cuda"]:
        built = facts["devices"].get("torch_cuda")
        devices.append(("cuda", f"no device ({'torch has CUDA ' + built if built else 'CPU torch'})"))
    backends = [
        (b["name"], f"{'yes' if b['available'] else 'no '}  {b['reason']}".rstrip())
        for b in facts["backends"]
    ]
    environment = [
        (name, value if name in ENVIRONMENT_VARIABLES else f"{value}  (not a variable of ours)")
        for name, value in facts["environment"].items()
    ] or [("EPI_KERNELS_*", "none set")]

    sections = {
        "versions": versions,
        "devices": devices,
        "backends": backends,
        "environment": environment,
    }
    lines = []
    for title, rows in sections.items():
        width = max(len(name) for name, _ in rows)
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows), ""]
    return "\n".join(lines).rstrip()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON, for a program to read")


def run(args: argparse.Namespace) -> int:
    facts = report()
    print(json.dumps(facts, indent=2) if args.json else format_report(facts), file=sys.stdout)
    return 0
