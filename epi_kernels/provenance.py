"""Where a result comes from: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import epi_kernels


def _first(pattern: str, path: str) -> str | None:
    try:
        match = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return match.group(1).strip() if match else None


def _isa() -> str:
    """The instruction set that the cpu backend takes here."""
    from epi_kernels.backends.dispatch import load

    return getattr(load("cpu"), "isa", "none")


def machine() -> dict[str, Any]:
    """No host name: a model, its cores and its caches are what a timing depends on."""
    model = _first(r"^model name\s*:\s*(.+)$", "/proc/cpuinfo") or platform.processor() or platform.machine()
    memory_kib = _first(r"^MemTotal:\s*(\d+) kB", "/proc/meminfo")
    # the index of the last-level cache differs; the highest that exists is it
    caches = [_first(r"(.+)", f"/sys/devices/system/cpu/cpu0/cache/index{i}/size") for i in range(5)]
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "isa": _isa(),
        "last_level_cache": next((size for size in reversed(caches) if size), None),
        "memory_gib": round(int(memory_kib) / 2**20, 1) if memory_kib else None,
        "platform": f"{platform.system()} {platform.machine()}",
    }


def versions(*packages: str) -> dict[str, str]:
    """Of this package, Python, and those of ``packages`` that are installed."""
    found = {"epi_kernels": epi_kernels.__version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git(folder: Path, *arguments: str) -> str | None:
    """What git says in a folder; None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
