"""Peak memory of a refresh above a step's, in a process of its own.

    python -m bench.bench_memory --elements 1e8 --dtype float32

The process's high-water mark (VmHWM) is reset before each call and read after it. glibc is told to
hand every larger block back at once (``MALLOC_*`` below), so that a temporary cannot hide in memory
that an earlier call had freed. Linux only; the counters are exact to some tens of KiB.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# A fixed mmap threshold also switches off the dynamic one, which grows with what is freed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
CALLS = 3  # of each kind; the largest counts


def status_kib(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match.group(1))


def peak_mib(call: Callable[[], Any]) -> float:
    """MiB by which the resident set rose during the call, whether or not it was given back."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status_kib("VmHWM")
    call()
    return (status_kib("VmHWM") - before) / 1024


def measure(
    elements: int, tensors: int, dtype_name: str, options: dict[str, Any], backend: str, threads: int
) -> dict:
    import torch

    from bench.bench_cpu import our_optimizer, parameters
    from bench.registry import Case
    from epi_kernels.backends import choose

    torch.set_num_threads(threads)
    case = Case("memory", "memory", getattr(torch, dtype_name), elements, tensors, options)
    ours = our_optimizer(case, parameters(case), backend, mask_interval=2)
    for _ in range(3):  # one of each kind, so that threads and lazy imports are there; ends at even T
        ours.step()
    peaks: dict[str, list[float]] = {"step": [], "step_with_refresh": [], "stand_alone_refresh": []}
    for _ in range(CALLS):
        peaks["step"].append(peak_mib(ours.step))
        peaks["step_with_refresh"].append(peak_mib(ours.step))
        peaks["stand_alone_refresh"].append(peak_mib(ours.refresh_isolation_mask))
    assert ours.param_groups[0]["isolation_step"] % 2 == 0
    report = ours.isolation_report()
    return {
        "peak_mib": {kind: max(values) for kind, values in peaks.items()},
        "backend": choose(backend, torch.device("cpu"), case.dtype).backend.name,
        "isolated": 0.0 if report is None else report.isolated / elements,
    }


def in_subprocess(
    elements: int, tensors: int, dtype: str, options: dict[str, Any], backend: str, threads: int
) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.bench_memory", "--elements", str(elements), "--dtype", dtype]
    command += ["--tensors", str(tensors), "--options", json.dumps(options)]
    command += ["--backend", backend, "--threads", str(threads)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | MALLOC, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:])} exited {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=lambda text: int(float(text)), default=100_000_000)
    parser.add_argument("--tensors", type=int, default=10)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--options", type=json.loads, default={}, help="of MaskedEMAAdamW, as JSON")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    result = measure(args.elements, args.tensors, args.dtype, args.options, args.backend, args.threads)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
