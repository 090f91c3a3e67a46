"""The README's blocks on a GPU: timings and targets of `make gpu` and `make gpu-side-by-side`, rows of `make gpu-large`.

What was never run is said to be, with the command that runs it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import results, side_by_side_table, status
from bench.contenders import BF16, F32, REFERENCE
from bench.markdown import Row, alike, contender_name, count, mib, milliseconds, spread
from bench.registry import Target
from bench.sources import kernel_hash
from epi_kernels.markdown import escape, table

EIGHT_BIT = "ours, bfloat16, 8-bit states"
FLASHOPTIM = ("flashoptim", "flashoptim, 24-bit weights")
PEERS = (*FLASHOPTIM, "torchao 8-bit", "torchao 4-bit", "bitsandbytes 8-bit")
HOST_BOUND_PEERS = (*FLASHOPTIM, "optimi with Kahan")
INTERVAL = 100  # H, of the target on refreshes
STATE = "state_bytes_per_parameter"


def _at_most(limit: float) -> Target:
    return Target("value", limit)


def _at_least(limit: float) -> Target:
    return Target("value", math.inf, limit)


class Claim(NamedTuple):
    """A target and the figure that was measured for it, None where there is none."""

    what: str
    target: Target
    value: float | None

    @property
    def met(self) -> bool | None:
        return self.target.met({"value": self.value})

    def cells(self) -> list[str]:
        high, low = self.target.high, self.target.low
        limit = f"at most {high:.3g}" if low is None else f"at least {low:.3g}"
        verdict = {True: "met", False: "**missed**", None: "-"}[self.met]
        return [self.what, limit, "not measured" if self.value is None else f"{self.value:.3f}", verdict]


# ---------------------------------------------------------------- targets


# Of a step with isolation on, by dtype and states: at most so much of torch's fused one, at least so much of a copy's bandwidth.
EIGHT_BIT_STEP = "bfloat16, 8-bit states"
STEPS = {
    "float32": (("float32", None), 1.02, 0.9),
    EIGHT_BIT_STEP: (("bfloat16", "int8"), 0.8, 0.85),
}
OF_TORCH_FLOAT32 = 0.42  # the latter's, of torch's fused float32 step


def device_claims(run: Row | None) -> list[Claim]:
    """Of `make gpu`: each the worst over its workloads, a backend at a time."""
    timed = [row for row in run["rows"] if "ms" in row] if run else []
    backends = list(dict.fromkeys(row["backend"] for row in timed)) or ["any backend"]
    found = []
    for backend in backends:
        own = [row for row in timed if row["backend"] == backend]
        for name, (kind, most, share) in STEPS.items():
            rows = [row for row in own if (row["dtype"], row["state_dtype"]) == kind]
            ratios = [row["step_over_torch"]["p50"] for row in rows]
            shares = [row["copy_share"] for row in rows if "copy_share" in row]
            step = f"{name}, isolation on, `{backend}`:"
            found.append(Claim(f"{step} step, of torch fused", _at_most(most), max(ratios, default=None)))
            found.append(
                Claim(f"{step} share of copy bandwidth", _at_least(share), min(shares, default=None))
            )
        found.append(
            Claim(
                f"a refresh every {INTERVAL} steps, `{backend}`: of the steps between",
                _at_most(0.01),
                max((row["refresh_over_step"]["p50"] / INTERVAL for row in own), default=None),
            )
        )
    return found


def side_by_side_claims(rows: Sequence[Row] | None) -> list[Claim]:
    """Of `make gpu-side-by-side`."""
    named = {(row["list"], row["contender"]): row for row in rows or []}

    def figure(key: str, contender: str = EIGHT_BIT, where: str = "one-tensor") -> float | None:
        value: Any = named.get((where, contender))
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def beside(other: str, where: str) -> float | None:
        ours, theirs = (figure("ours_ms.p50", one, where) for one in (EIGHT_BIT, other))
        return ours / theirs if ours and theirs else None

    step = "bfloat16 weights, 8-bit states, isolation on: "
    many = "1,000 tensors of 4,096: "
    one_tensor, small = "one-tensor", "small-tensors"
    _, of_bfloat16, share = STEPS[EIGHT_BIT_STEP]
    return [
        Claim(f"{step}share of copy bandwidth", _at_least(share), figure("copy_share")),
        Claim(f"{step}of {REFERENCE[BF16]}", _at_most(of_bfloat16), figure("ratio.p50")),
        Claim(f"{step}of {REFERENCE[F32]}", _at_most(OF_TORCH_FLOAT32), beside(REFERENCE[F32], one_tensor)),
        *(Claim(f"{step}of {peer}", _at_most(1.0), beside(peer, one_tensor)) for peer in PEERS),
        *(
            Claim(f"{many}{name}, of torch fused", _at_most(1.1), figure("ratio.p50", name, small))
            for name in ("ours, float32", "ours, bfloat16", EIGHT_BIT)
        ),
        *(
            Claim(f"{many}{EIGHT_BIT}, of {peer}", _at_most(1 / 3), beside(peer, small))
            for peer in HOST_BOUND_PEERS
        ),
    ]


def _claims_text(claims: Sequence[Claim]) -> str:
    judged = [claim for claim in claims if claim.met is not None]
    note = f"{sum(bool(claim.met) for claim in judged)} of {len(judged)} met"
    if len(judged) < len(claims):
        note += f", {len(claims) - len(judged)} not measured"
    header = ["target (the median; of several workloads the worst)", "limit", "measured", "verdict"]
    return table(header, [claim.cells() for claim in claims], "lrrl") + f"\n\n{note}."


# ---------------------------------------------------------------- timings


def _where(run: Row) -> str:
    commit = run["commit"] + (" with uncommitted changes" if run["dirty"] else "")
    stale = "" if run["kernel_hash"] == kernel_hash() else "; **the kernels have changed since**"
    return f"{run['device']['name']}, torch {run['versions']['torch']}, {run['date'][:10]}, commit {commit}{stale}"


def _timing_line(row: Row) -> list[str]:
    if "ms" not in row:
        return [row["name"].removeprefix("time-"), "-", "did not run", *["-"] * 6]
    rounding = {None: "", True: ", stochastic rounding", False: ", rounding to nearest"}[
        row["stochastic_rounding"]
    ]
    states = {None: "", "int8": ", 8-bit states", "int4": ", 4-bit states"}[row["state_dtype"]]
    share = f"{row['step_gbps']:,.0f} ({row['copy_share']:.0%})" if "copy_share" in row else "-"
    above = row["refresh_peak_above_step_bytes"]
    return [
        f"{row['workload']}, {row['dtype']}{states}{rounding}",
        row["backend"],
        milliseconds(row["ms"]["step"]["p50"]),
        milliseconds(row["ms"]["torch"]["p50"]),
        spread(row["step_over_torch"]),
        share,
        spread(row["refresh_over_step"]),
        spread(row["standalone_refresh_over_step"]),
        "-" if above is None else f"{above / 2**20:.2f}",
    ]


def timings(folder: Path = results.RESULTS) -> str:
    """The newest whole `make gpu`, the newest whole `make gpu-side-by-side`, and the targets of both."""
    run, rows = status.newest(folder), side_by_side_table.newest(folder, "cuda")
    parts = []
    if run is None:
        parts.append("Timings: never run: `make gpu`.")
    else:
        copy = run["copy_gbps"]
        moved = f"; a copy moves {copy['p50']:,.0f} GB/s, read and written" if "p50" in copy else ""
        header = ["step, isolation on", "backend", "ours, ms", "torch fused, ms", "ratio", "GB/s (of a copy)"]
        header += ["refresh / step", "stand-alone", "a refresh takes, MiB"]
        parts.append(f"{_where(run)}{moved}.")
        parts.append(table(header, [_timing_line(row) for row in run["rows"]], "llrrrrrrr"))
        parts.append(_why_not(run["rows"], "name"))
    if rows is None:
        parts.append("Side by side: never run on a GPU: `make gpu-side-by-side`.")
    else:
        parts.append(side_by_side_table.text(folder, "cuda"))
    if run is not None or rows is not None:
        parts.append(_claims_text([*device_claims(run), *side_by_side_claims(rows)]))
    return "\n\n".join(part for part in parts if part)


def _why_not(rows: Sequence[Row], key: str) -> str:
    """A paragraph on the rows without figures."""
    reasons = [
        f"{row[key]}: {escape(row.get('skipped') or row['error']).rstrip('.')}"
        for row in rows
        if "skipped" in row or "error" in row
    ]
    return f"Did not run. {'; '.join(reasons)}." if reasons else ""


# ---------------------------------------------------------------- the large model


def newest_large(folder: Path) -> list[Row]:
    """The newest run of each model on a GPU, by the model's name; smoke runs are none."""
    found: dict[str, Row] = {}
    for path in sorted(folder.glob("large-*.json")):
        run = json.loads(path.read_text())
        if run["smoke"] or run["device"]["type"] != "cuda":
            continue
        if run["model"] not in found or run["date"] > found[run["model"]]["date"]:
            found[run["model"]] = run
    return [found[name] for name in sorted(found)]


def _gb(n: float | None) -> str:
    return "-" if n is None else f"{n / 1e9:,.1f}"


def _large_line(row: Row, reference: Row) -> list[str]:
    if "step_ms" in row:
        refresh = row.get("refresh_ms")
        figures = [
            _gb(row["peak_bytes"]),
            milliseconds(row["step_ms"]["p50"]),
            "out of memory" if "refresh_skipped" in row else "-" if refresh is None else milliseconds(refresh["p50"]),
            mib(row.get("refresh_peak_bytes")),
            f"{row[STATE]:.3f}",
        ]  # fmt: skip
    else:
        memory = row.get("skipped", "").startswith("out of memory")
        figures = ["out of memory" if memory else "did not run", *["-"] * 4]
    return [
        contender_name(row),
        "yes" if row["isolates"] else "no",
        *figures,
        *alike(row, reference, STATE),
    ]


def _large_text(run: Row) -> str:
    rows = run["rows"]
    (reference,) = [row for row in rows if row["contender"] == REFERENCE[BF16]]
    parameters = max(row.get("parameters", 0) for row in rows)
    caption = (
        f"{run['model']}, {count(parameters)} parameters, bfloat16, random weights, a sequence of {run['tokens']} tokens a "
        f"step with activation checkpointing; {_where(run)}. Peak: weights, gradients, state, activations and temporaries; "
        "'like' and 'unlike' compare with torch's fused AdamW."
    )
    header = ["optimizer", "isolates", "peak, GB", "step, ms", "refresh, ms", "a refresh takes, MiB"]
    header += ["state, bytes a parameter", "like", "unlike"]
    lines = [_large_line(row, reference) for row in rows]
    refreshes = [
        {"contender": f"{row['contender']}, refresh", "skipped": row["refresh_skipped"]}
        for row in rows
        if "refresh_skipped" in row
    ]
    return "\n\n".join(
        part
        for part in (caption, table(header, lines, "llrrrrrll"), _why_not([*rows, *refreshes], "contender"))
        if part
    )


def large(folder: Path = results.RESULTS) -> str:
    """The newest run of each model."""
    runs = newest_large(folder)
    if not runs:
        return "Large model: never run: `make gpu-large`."
    return "\n\n".join(map(_large_text, runs))
