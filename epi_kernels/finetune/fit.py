"""`--fit GB`: the options with which a model trains on a card of that size, as epi_kernels/planner weighs them up."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from epi_kernels.planner import machine, plans
from epi_kernels.planner.command import find_plans
from epi_kernels.planner.machine import GB

from .errors import UserError
from .model import load_config, row_length, sizes_of
from .options import Options
from .plan import of_states

DECIDED = (
    "dtype",
    "state_dtype",
    "master_weight_bits",
    "offload",
    "gradient_checkpointing",
    "gradient_release",
)
STATE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def check(options: Options) -> None:
    """Refuses what `--fit` does not plan for, and options that it decides."""
    defaults = Options()
    given = [name for name in DECIDED if getattr(options, name) != getattr(defaults, name)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(
            f"--fit decides {flags}: leave it out, or plan by hand with `epi-kernels memory --card`"
        )
    for name, planned in (("fsdp", "one card"), ("compare", "one optimizer's states")):
        if getattr(options, name):
            raise UserError(f"--fit plans for {planned}: leave out --{name} or --fit")
    if options.attention != "sdpa":
        raise UserError(f"--fit counts with --attention sdpa, not {options.attention}: leave out one of them")


def fitted(options: Options) -> tuple[Options, list[str]]:
    """The options with those of the plan that fits best, and what to say of it.

    Raises:
        UserError: nothing fits, or an option that `--fit` decides was given.
    """
    assert options.fit is not None
    check(options)
    config = load_config(options.model)
    sizes, length = sizes_of(config), row_length(config, options.max_length)
    job = plans.Job(options.fit, options.batch_size, length, options.accumulation, of_states(options))
    found = find_plans(config, sizes, job, machine.rates(options.fit), quiet=options.quiet)
    best = plans.choose(found)
    if best is None:
        raise UserError(f"--fit {options.fit:g}: {job.nothing_fits()}")
    chosen, one = best.configuration.options, best.configuration
    state: Any = chosen.get("state_dtype")
    notes = [
        f"--fit {options.fit:g}: {one.name}"
        + (", gradient checkpointing" if one.checkpointing else "")
        + (", gradient release" if one.release else "")
        + f"; {best.device_bytes / GB:.2f} GB on the card"
        + (f", {best.host_bytes / GB:.1f} GB in host memory" if best.host_bytes else "")
    ]
    if one.release and options.max_grad_norm > 0:
        notes.append("note: gradients are freed before their norm is known: not clipped (--max-grad-norm 0)")
    return (
        dataclasses.replace(
            options,
            dtype="bf16",
            state_dtype=STATE_NAMES.get(state, state),
            master_weight_bits=chosen.get("master_weight_bits", 16),
            offload=chosen.get("offload"),
            gradient_checkpointing=one.checkpointing,
            gradient_release=one.release,
            max_grad_norm=0.0 if one.release else options.max_grad_norm,
        ).checked(),
        notes,
    )
