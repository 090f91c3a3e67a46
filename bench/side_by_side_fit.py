"""What of bench.side_by_side's lists a machine holds: how much of an architecture, and who sits out a list.

Both follow from the memory that is free and from what a contender took over the largest list so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bench.gpu_device import Device
from bench.gpu_timing import MASK_BYTES
from bench.shapes import Architecture, ParameterList

ROOM = 0.95  # of the free memory; the rest is for what is not the optimizers'
# The most elements of an architecture's list on a CPU, so that a whole run on two cores with 24 GiB (AMD EPYC, AVX-512)
# takes about half an hour: the sum over all rows of steps, refreshes, page faults (0.4 s a GB) and random numbers (5 ns
# each), by the milliseconds of the record of 2026-11-29, is 25 minutes (of that record itself 25; it took 26). It holds
# embedding, head and one layer of the largest, Qwen2-7B's 1.32e9.
CPU_ELEMENTS = 1_400_000_000


def bytes_each(row: Mapping[str, Any]) -> float:
    """Bytes an element that a contender took beside weights and gradients: its state, and the most of a call."""
    calls = (row.get("step_peak_bytes"), row.get("refresh_peak_bytes"))
    return row["state_bytes_per_element"] + max(taken or 0 for taken in calls) / row["elements"]


def fitting(
    model: Architecture, dtype: torch.dtype, device: Device, taken: Mapping[str, Mapping[str, Any]], most: int
) -> ParameterList:
    """The whole model where it fits beside the states of torch's fused AdamW and of ours by default; else what fits beside
    those of every configuration of ours. On a CPU at most ``most`` elements. ``taken``: rows by contender.
    """
    default = 2 * dtype.itemsize + MASK_BYTES
    named = str(dtype).removeprefix("torch.")
    ours = [row for name, row in taken.items() if name.startswith("ours") and row["dtype"] == named]
    free = ROOM * device.free_bytes()
    each = 4 * dtype.itemsize  # weights, gradients and the state of torch's
    elements = int(free / (each + max(map(bytes_each, ours), default=default)))
    if model.elements <= free / (each + default):
        elements = max(elements, model.elements)
    return model.fitting(min(elements, most) if device.type == "cpu" else elements)


def sits_out(
    row: Mapping[str, Any] | None, elements: int, held_bytes: int, device: Device, slow_seconds: float
) -> dict[str, Any]:
    """Why a contender does not run over so many elements, empty where it does. ``row``: of the largest list it ran over;
    ``held_bytes``: weights, gradients and the state of torch's fused AdamW, which are there.
    """
    if row is None:
        return {}
    need, free = held_bytes + int(elements * bytes_each(row)), held_bytes + device.free_bytes()
    if need - held_bytes > ROOM * (free - held_bytes):
        why = f"needs {need / 1e9:.1f} GB with weights, gradients and torch fused's state, {free / 1e9:.1f} GB are there"
        return {"skipped": why, "needs_bytes": need}
    seconds = row["ns_per_element"] * elements / 1e9
    if seconds > slow_seconds:
        return {"skipped": f"about {seconds:.0f} s a step"}
    return {}
