"""What a timing asks of its device: a CUDA device, or the CPU in its place for smoke runs."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


class CudaDevice:
    """Times with events: what the stream was busy with or waited for between two points."""

    type = "cuda"

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())

    def facts(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.torch_device)
        return {
            "type": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def time_round(self, calls: list[Callable[[], Any]]) -> list[float]:
        """Milliseconds of each call, one after the other; waits for the device once, at the end."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        marks[0].record()
        for call, mark in zip(calls, marks[1:]):
            call()
            mark.record()
        self.synchronize()
        return [start.elapsed_time(end) for start, end in zip(marks, marks[1:])]

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """The most that tensors held during a call, above what they held before it."""
        self.synchronize()
        before = torch.cuda.memory_allocated(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.torch_device) - before


class CpuDevice:
    """Plays a device, so that everything but the figures can be tested without one."""

    type = "cpu"
    torch_device = torch.device("cpu")

    def facts(self) -> dict[str, Any]:
        return {"type": "cpu", "name": "cpu", "capability": None, "multiprocessors": None, "memory_gib": None}

    def free_bytes(self) -> int:
        """What the kernel says can be had without swapping; off Linux half of what there is."""
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10
        except OSError:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2

    def synchronize(self) -> None:
        pass

    def time_round(self, calls: list[Callable[[], Any]]) -> list[float]:
        times = []
        for call in calls:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        call()
        return None


Device = CudaDevice | CpuDevice


def open_device(name: str) -> Device | str:
    """The device, or why there is none."""
    if name == "cpu":
        return CpuDevice()
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return CudaDevice()


def add_arguments(parser: argparse.ArgumentParser, smoke: str) -> None:
    """What the GPU programs have in common. ``smoke``: what --smoke makes small."""
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="stop in time; run again to go on"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help=f"{smoke}: tests this program, times nothing")


def device_of(parser: argparse.ArgumentParser, args: argparse.Namespace, target: str) -> Device | None:
    """The device of parsed arguments; None, and said why, where there is none. ``target``: of make."""
    if args.device == "cpu" and not args.smoke:
        parser.error("--device cpu is for --smoke: a CPU's figures are no GPU's")
    device = open_device(args.device)
    if isinstance(device, str):
        print(f"make {target}: no GPU here: {device}. Nothing was run.", file=sys.stderr)
        return None
    return device


def versions() -> dict[str, str | None]:
    """What a GPU figure depends on besides the code."""
    found: dict[str, str | None] = {"torch_cuda": torch.version.cuda, "nvcc": None, "driver": None}
    for name in ("triton", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    nvcc = re.search(r"release (\d+\.\d+)", _output("nvcc", "--version"))
    found["nvcc"] = nvcc[1] if nvcc else None
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").strip()
    found["driver"] = driver.splitlines()[0] if driver else None
    return found


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
