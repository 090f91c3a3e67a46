"""Timings of `make gpu`: steps and refreshes over one list of parameters, beside torch's fused AdamW.

A round calls every contestant once, over the same weights and gradients; ratios are taken round by
round. What the stream waits for the host is in the figures, as it is in a training loop.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench import shapes
from bench.gpu_device import Device
from bench.results import paired_ratios, percentiles

MASK_BYTES = 1 / 8


@dataclass(frozen=True)
class Effort:
    """How much one timing does."""

    elements: int = 1_000_000_000  # of the single tensor, where memory allows
    seconds: float = 4.0  # a workload, about
    min_rounds: int = 10
    max_rounds: int = 60
    warm_up: int = 3
    copy_bytes: int = 4 << 30


SMOKE = Effort(elements=20_000, seconds=0.05, min_rounds=2, max_rounds=2, warm_up=1, copy_bytes=1 << 20)


@dataclass(frozen=True)
class Workload:
    """``options``: of MaskedEMAAdamW; isolation is on in all of them."""

    name: str  # one-tensor | llama-1b
    dtype: torch.dtype
    backend: str
    stochastic_rounding: bool | None = None
    state_dtype: str | None = None  # int8 | int4; None: the weights'

    @property
    def slice_name(self) -> str:
        rounding = {None: "", True: "-stochastic", False: "-nearest"}[self.stochastic_rounding]
        kind = {torch.float32: "f32", torch.bfloat16: "bf16"}[self.dtype]
        states = "" if self.state_dtype is None else f"-{self.state_dtype}"
        return f"time-{self.name}-{kind}{states}{rounding}-{self.backend}"


KINDS = (
    (torch.float32, None, None),
    (torch.bfloat16, True, None),
    (torch.bfloat16, False, None),
    (torch.bfloat16, True, "int8"),
    (torch.bfloat16, True, "int4"),
)


def workloads(backends: list[str]) -> list[Workload]:
    return [
        Workload(name, dtype, backend, rounding, states)
        for name in ("one-tensor", "llama-1b")
        for dtype, rounding, states in KINDS
        for backend in backends
    ]


def copy_gbps(device: Device, effort: Effort) -> dict[str, float]:
    """GB/s, read and written, of the largest plain copy: what a share of bandwidth refers to."""
    n = min(effort.copy_bytes, device.free_bytes() // 4) // 4
    source = torch.randn(n, device=device.torch_device)
    target = torch.empty_like(source)
    times = [device.time_round([lambda: target.copy_(source)])[0] for _ in range(effort.warm_up + 20)]
    gbps = percentiles([8 * n / (ms * 1e6) for ms in times[effort.warm_up :]])
    return {"bytes": 8 * n, **{name: round(value, 1) for name, value in gbps.items()}}


def measure(work: Workload, device: Device, effort: Effort, smoke: bool) -> dict[str, Any]:
    """One row: percentiles in ms, paired ratios, GB/s, and the memory a refresh takes."""
    from epi_kernels import MaskedEMAAdamW

    # weight, gradient, torch's two states, ours (at most as large) and the mask; a tenth for what is not ours
    per_element = 6 * work.dtype.itemsize + MASK_BYTES
    room = int(device.free_bytes() * 0.9 / per_element)
    if work.name == "one-tensor":
        sizes = [(n,)] if (n := min(effort.elements, 10 ** int(math.log10(max(room, 1))))) else []
    else:
        sizes = shapes.tiny_llama() if smoke else shapes.llama_1b()
    elements = sum(math.prod(shape) for shape in sizes)
    row: dict[str, Any] = {
        "name": work.slice_name,
        "workload": work.name,
        "dtype": str(work.dtype).removeprefix("torch."),
        "backend": work.backend,
        "stochastic_rounding": work.stochastic_rounding,
        "state_dtype": work.state_dtype,
        "elements": elements,
        "tensors": len(sizes),
    }
    if elements == 0 or elements > room:
        return {**row, "skipped": f"{elements} elements need {elements * per_element / 2**30:.1f} GiB"}

    params = []
    for shape in sizes:
        param = torch.nn.Parameter(torch.randn(shape, device=device.torch_device, dtype=work.dtype) * 0.02)
        param.grad = torch.randn_like(param) * 1e-3
        params.append(param)
    arguments = {
        "lr": 1e-6,
        "backend": work.backend,
        "stochastic_rounding": work.stochastic_rounding,
        "state_dtype": work.state_dtype,
    }
    ours = MaskedEMAAdamW(params, mask_interval=None, **arguments)
    theirs = torch.optim.AdamW(params, lr=1e-6, fused=True)
    ours.step()
    ours.refresh_isolation_mask()  # from here on a hundredth is isolated
    refreshing = MaskedEMAAdamW(params, mask_interval=1, **arguments)
    refreshing.state = ours.state  # the same tensors: this one refreshes after every step
    calls: dict[str, Callable[[], Any]] = {
        "torch": theirs.step,
        "step": ours.step,
        "step_and_refresh": refreshing.step,
        "refresh": ours.refresh_isolation_mask,
    }
    return {**row, **_rounds(device, effort, calls), **_memory(device, ours, refreshing)}


def _rounds(device: Device, effort: Effort, calls: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    order = list(calls)
    for _ in range(effort.warm_up):
        warm = device.time_round([calls[name] for name in order])
    wanted = int(effort.seconds * 1e3 / max(sum(warm), 1e-3))
    rounds = min(max(wanted, effort.min_rounds), effort.max_rounds)
    times: dict[str, list[float]] = {name: [] for name in order}
    for number in range(rounds):
        turn = order[number % len(order) :] + order[: number % len(order)]  # no one always follows the same
        for name, ms in zip(turn, device.time_round([calls[name] for name in turn])):
            times[name].append(ms)
    extra = [both - alone for both, alone in zip(times["step_and_refresh"], times["step"])]
    return {
        "rounds": rounds,
        "ms": {name: percentiles(values) for name, values in times.items()},
        "step_over_torch": percentiles(paired_ratios(times["step"], times["torch"])),
        # a refresh that follows a step reduces its statistics inside it
        "refresh_over_step": percentiles(paired_ratios(extra, times["step"])),
        "standalone_refresh_over_step": percentiles(paired_ratios(times["refresh"], times["step"])),
    }


def _memory(device: Device, ours: Any, refreshing: Any) -> dict[str, Any]:
    step, both = device.peak_bytes(ours.step), device.peak_bytes(refreshing.step)
    alone = device.peak_bytes(ours.refresh_isolation_mask)
    above = None if step is None or both is None or alone is None else max(both, alone) - step
    return {
        "peak_bytes": {"step": step, "step_and_refresh": both, "refresh": alone},
        "refresh_peak_above_step_bytes": above,
        "state_bytes_per_element": ours.state_bytes()["total"] / sum(p.numel() for p in _params(ours)),
    }


def _params(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step_bytes(itemsize: float, state: float, mask: float = 0.0) -> float:
    """The least a step moves an element: weight in and out, gradient in, state in and out, but for ``mask`` bytes of it,
    which are only read."""
    return 3 * itemsize + 2 * state - mask


def with_bandwidth(row: dict[str, Any], copy: dict[str, float]) -> dict[str, Any]:
    """Adds GB/s of the step and its share of the copy's."""
    if "ms" not in row:
        return row
    itemsize = 4 if row["dtype"] == "float32" else 2
    each = step_bytes(itemsize, row["state_bytes_per_element"], MASK_BYTES)
    gbps = row["elements"] * each / (row["ms"]["step"]["p50"] * 1e6)
    return {**row, "step_gbps": round(gbps, 1), "copy_share": round(gbps / copy["p50"], 3)}


def release() -> None:
    """Lets the next workload have the memory of the last."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def imports_frozen() -> Iterator[None]:
    """Collections inside leave out what was there before, imports above all: 0.2 s each on an AMD EPYC, by time.perf_counter."""
    # imports what an optimizer imports when it is made
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
