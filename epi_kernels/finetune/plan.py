"""What a run will take: bytes beside AdamW's and EPI's as published, steps, refreshes due (`--dry-run`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from epi_kernels import footprint, published
from epi_kernels.policies.schedule import refresh_steps
from epi_kernels.text import columns, human_bytes

from .model import STATE_DTYPES
from .options import Options


@dataclass(frozen=True)
class Memory:
    """Bytes, without activations and temporaries."""

    weights: int
    gradients: int
    ours: int
    adamw: int
    epi_as_published: int
    parameters: int

    def fields(self) -> dict[str, int]:
        return dict(vars(self))


def memory(parameters: Iterable[torch.Tensor], dtype: torch.dtype, options: Options) -> Memory:
    """Of a model whose parameters have these shapes and are held in `dtype`; step counters are left out."""
    sizes = [(tensor.numel(), tensor.requires_grad) for tensor in parameters]
    every = sum(count for count, _ in sizes)
    trained = [count for count, trains in sizes if trains]
    ours = footprint.masked_ema_adamw(
        trained,
        dtype,
        **of_states(options),
        state_dtype=STATE_DTYPES[options.state_dtype] if options.state_dtype else None,
        master_weight_bits=options.master_weight_bits,
    )
    released = options.gradient_release and options.accumulation == 1  # else they are kept from pass to pass
    total = sum(trained)
    return Memory(
        weights=every * dtype.itemsize,
        gradients=(max(trained, default=0) if released else total) * dtype.itemsize,
        ours=ours["total"] - ours["other"],
        adamw=2 * dtype.itemsize * total,
        epi_as_published=published.STATE_TOTAL_BYTES * total,
        parameters=total,
    )


def of_states(options: Options) -> dict[str, Any]:
    """What `footprint.tensors` takes of the options that `--fit` leaves alone."""
    return {
        "betas": (options.beta1, options.beta2),
        "isolation_ratio": options.isolation_ratio,
        "importance_beta": options.importance_beta,
        "importance_dtype": STATE_DTYPES[options.importance_dtype],
        "persistent_masks": bool(options.freeze),
    }


def refreshes(options: Options, steps: int) -> list[int]:
    """Steps after which a refresh is due; 0 stands for the one before the first step of a protected run.

    With an adaptive interval those known beforehand: the masks say when the next ones come.
    """
    if options.isolation_ratio == 0:
        return []
    due = refresh_steps(steps, interval=options.mask_interval, warmup=options.mask_warmup)
    if options.adaptive_interval is not None:
        due = due[:1]
    return ([0] if options.protect else []) + due


def warning(options: Options, steps: int) -> str:
    """A run that never isolates anything; empty when it does."""
    due = refreshes(options, steps)
    if options.isolation_ratio == 0 or options.freeze or (due and due[0] < steps):
        return ""
    first = options.mask_warmup if options.mask_warmup is not None else options.mask_interval
    return (
        f"nothing will be isolated: the run ends after {steps} steps, the first refresh of the mask comes after step {first}. "
        "Give --protect (isolates from the first step), a smaller --mask-interval or --mask-warmup, or train longer"
    )


def describe_memory(one: Memory, offload: str | None = None) -> str:
    per = max(1, one.parameters)
    state = "optimizer state, this run" + (" (host memory)" if offload else "")
    rows = [("weights", one.weights), ("gradients", one.gradients), (state, one.ours)]
    rows += [("  beside torch AdamW's", one.adamw), ("  beside EPI's as published", one.epi_as_published)]
    header = ("memory (without activations)", "bytes", "a parameter")
    return columns([header, *((name, human_bytes(count), f"{count / per:.3f}") for name, count in rows)])


def describe_ranks(options: Options, ranks: int) -> str:
    each = "weights, gradients and states lie over all of them" if options.fsdp else "each holds all weights"
    text = f"ranks: {ranks}, which share the rows of a step; {each}"
    rows = options.batch_size * options.accumulation
    if rows < ranks:
        text += f"\nnote: {rows} rows a step leave {ranks - rows} ranks without any: raise --batch-size or --accumulation"
    return text


def describe_steps(options: Options, steps: int, steps_per_epoch: int, rows: int) -> str:
    due = refreshes(options, steps)
    shown = ", ".join(map(str, due[:6])) + (", ..." if len(due) > 6 else "")
    planned = f"refreshes of the mask due: {len(due)}" + (f" (after steps {shown})" if due else "")
    if due and options.adaptive_interval is not None:
        low, high = options.adaptive_interval
        planned = f"refreshes of the mask due: after steps {shown}, then every {low} to {high} steps, as the masks drift"
    return (
        f"steps: {steps} ({steps_per_epoch} an epoch, from {rows} rows: {options.batch_size} rows x {options.accumulation} passes a step)\n"
        + planned
    )
