"""`epi-kernels memory --card GB`: the configuration with which a model trains on that card."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from epi_kernels.planner import activations, machine, plans
from epi_kernels.planner.machine import GB, Machine
from epi_kernels.text import columns

BATCH, LENGTH = 1, 2048
RATES = ("card_gbps", "card_tflops", "link_gbps", "host_gbps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "--card", "which configuration trains on a card of so many GB (10^9 bytes)"
    )
    group.add_argument("--card", type=float, metavar="GB", help="GB of the card's memory, 24 say")
    group.add_argument("--batch-size", type=int, metavar="N", help=f"sequences of a step [{BATCH}]")
    group.add_argument("--max-length", type=int, metavar="N", help=f"tokens of each [{LENGTH}]")
    known = ", ".join(f"{size}: {card.name}" for size, card in machine.CARDS.items())
    group.add_argument(
        "--card-gbps", type=float, metavar="GB/S", help=f"of the card's memory [data sheet of {known}]"
    )
    group.add_argument("--card-tflops", type=float, metavar="N", help="dense bfloat16 [likewise]")
    group.add_argument(
        "--link-gbps", type=float, metavar="GB/S", help="card to host, one direction [likewise]"
    )
    group.add_argument(
        "--host-gbps", type=float, metavar="GB/S", help="of the host's memory [measured here by a copy]"
    )


def check(args: argparse.Namespace) -> None:
    """Raises SystemExit naming the argument that cannot be."""
    numbers = ("card", "batch_size", "max_length", *RATES)
    if args.card is None:
        given = [f"--{name.replace('_', '-')}" for name in numbers if getattr(args, name) is not None]
        if given:
            raise SystemExit(f"epi-kernels memory: {', '.join(given)} plans for a card: give --card too")
        return
    if args.dtype != "bfloat16":
        raise SystemExit(f"epi-kernels memory: --card plans for bfloat16 weights, not --dtype {args.dtype}")
    if args.isolated_rows is not None:
        raise SystemExit(
            "epi-kernels memory: --card plans without rows that are isolated for good: leave out --isolated-rows"
        )
    for name in numbers:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise SystemExit(
                f"epi-kernels memory: --{name.replace('_', '-')} is {value:g}; allowed: more than 0"
            )


def find_plans(
    config: Any, sizes: Sequence[int], job: plans.Job, rates: Machine, *, quiet: bool = False
) -> list[plans.Plan]:
    """Every configuration; passes are counted only where what is sure to be there fits.

    Raises:
        UserError: a pass cannot be counted.
    """
    passes: dict[tuple[bool, bool], int] = {}
    with tqdm(total=4, desc="counting passes", unit="pass", disable=True if quiet else None) as bar:

        def pass_of(checkpointing: bool, release: bool) -> int:
            if (checkpointing, release) not in passes:
                passes[checkpointing, release] = activations.peak_bytes(
                    config,
                    batch=job.batch,
                    length=job.length,
                    dtype=torch.bfloat16,
                    checkpointing=checkpointing,
                    release=release,
                )
                bar.update()
            return passes[checkpointing, release]

        return plans.plans(sizes, pass_of, job, rates)


def format_plans(
    name: str, sizes: Sequence[int], found: Sequence[plans.Plan], job: plans.Job, rates: Machine
) -> str:
    best = plans.choose(found)
    lines = [
        ["", "configuration", "checkpointing", "release", "card GB", "left", "host GB", "update s", "step s"]
    ]
    for plan in found:
        one = plan.configuration
        lines.append(
            [
                "->" if plan is best else "",
                one.name,
                "yes" if one.checkpointing else "no",
                "yes" if one.release else "no",
                (">" if plan.at_least else "") + f"{plan.device_bytes / GB:.2f}",
                f"{plan.left_bytes / GB:.2f}" if plan.fits else "-",
                f"{plan.host_bytes / GB:.1f}" if plan.host_bytes else "-",
                "-" if plan.at_least else f"{plan.update_seconds:.3g}",
                "-" if plan.at_least else f"{plan.seconds:.3g}",
            ]
        )
    head = f"{name}: {sum(sizes):,} parameters, bfloat16, {job.batch} x {job.length:,} tokens, on a card of {job.card_gb:g} GB\n"
    return "\n".join([head, columns(lines, left=(0, 1), rule=True), "", verdict(best, job, rates)])


def verdict(best: plans.Plan | None, job: plans.Job, rates: Machine) -> str:
    """What to do, and what was assumed."""
    if best is None:
        return job.nothing_fits()
    one = best.configuration
    lines = [
        f"-> {one.name}: {best.device_bytes / GB:.2f} GB of {job.card_gb:g}, {best.seconds:.3g} s a step expected."
    ]
    if one.offloaded:
        hidden = (
            "copies alone take longer than the backward pass"
            if best.host_gbps_to_hide is None
            else f"with {best.host_gbps_to_hide:.0f} GB/s there the backward pass hides the update"
        )
        lines.append(
            f"   The host holds {best.host_bytes / GB:.1f} GB in pinned memory; {hidden}, "
            f"with the {rates.host / GB:.0f} GB/s counted here "
            + (f"{best.update_seconds:.3g} s stick out." if best.update_seconds else "it does.")
        )
        lines.append(f"   torch pins powers of two; {plans.UNROUNDED} is to save what is rounded up.")
    settings = ", ".join(f"{name}={value!r}" for name, value in one.options.items())
    lines.append(f"   MaskedEMAAdamW(model.named_parameters(), {settings})")
    if one.release:
        lines.append(
            "   enable_gradient_release(model, optimizer), so no clipping by the norm of all gradients"
        )
    if one.checkpointing:
        lines.append("   model.gradient_checkpointing_enable()")
    lines += [
        "",
        "card GB: weights, what both passes hold at most (counted on tensors without memory), states, and "
        f"{plans.RESERVED / GB:g} GB for the context;",
        "> where weights, gradients and states alone are too much. step s: expected, not measured, of "
        f"{rates.card}: {rates.compute / 1e12 / machine.UTILISATION:.0f} TFLOP/s at {machine.UTILISATION:.0%},",
        f"{rates.memory / GB:.0f} GB/s, {rates.link / GB:.0f} GB/s to the host, whose memory moves {rates.host / GB:.0f} GB/s.",
    ]
    return "\n".join(lines)


def run(args: argparse.Namespace, config: Any, sizes: Sequence[int]) -> tuple[dict[str, Any], str]:
    """The report, ready for JSON, and as text.

    Raises:
        UserError: a pass cannot be counted.
    """
    job = plans.Job(args.card, args.batch_size or BATCH, args.max_length or LENGTH)
    rates = machine.rates(args.card, **{name: getattr(args, name) for name in RATES})
    found = find_plans(config, sizes, job, rates)
    best = plans.choose(found)
    facts = {
        "model": args.model,
        "parameters": sum(sizes),
        "card_bytes": job.card_bytes,
        "batch_size": job.batch,
        "max_length": job.length,
        "rates": dataclasses.asdict(rates),
        "chosen": None if best is None else found.index(best),
        "plans": [plan.facts() for plan in found],
    }
    return facts, format_plans(args.model, sizes, found, job, rates)
