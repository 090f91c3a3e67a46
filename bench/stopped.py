"""make stopped: at which refresh elements whose gradient stops leave the mask, and enter it again, in each state dtype.

python -m bench.stopped       a minute on two cores; writes bench/results/stopped-DATE-COMMIT.json

Of four neighbours one stops. One has a gradient up to three times larger and goes on; two have smaller ones, go on,
and take its place in the mask once its importance has decayed below theirs. Gradients are random here, so that
float32's elements scatter too; the test of the group has constant ones, which are quick.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import results
from bench.markdown import count
from epi_kernels import MaskedEMAAdamW
from epi_kernels.markdown import table

PREFIX = "stopped"


@dataclass(frozen=True)
class Plan:
    elements: int = 1 << 18  # a quarter of them stops: 65,536
    interval: int = 100  # mask_interval
    beta: float = 0.999  # of the importance
    settled: int = 15  # refreshes before the gradient stops
    without: int = 24  # until it returns
    again: int = 16
    random: bool = True
    seed: int = 0  # of gradients and of stochastic rounding


class Times(NamedTuple):
    """Of the elements that stop; refreshes after the gradient's stop, or its return: 1 is the first."""

    left: Tensor  # [stopped] int32: the first refresh without the element; 0: none
    entered: Tensor  # [stopped] int32: the first with it again; 0: none
    shares: list[float]  # of them isolated, at every refresh from the last one before the stop on


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "float32": {"state_dtype": torch.float32},
    "float32, other gradients": {"state_dtype": torch.float32},
    "bfloat16": {"state_dtype": torch.bfloat16},
    "8-bit": {"state_dtype": "int8"},
    "8-bit importance of its own": {"state_dtype": "int8", "importance_dtype": "int8"},
    "4-bit": {"state_dtype": "int4"},
}
BASE, OTHER_GRADIENTS = list(CONFIGURATIONS)[:2]


def run(plan: Plan, **dtypes: Any) -> Times:
    """With an ``importance_dtype`` the importance has a tensor of its own, else it is exp_avg_sq."""
    n = plan.elements
    place = torch.arange(n) % 4
    stops = place == 0
    size = torch.where(stops, 1.0, 0.7)
    size[place == 1] = torch.linspace(1.2, 3.0, n // 4)[
        torch.randperm(n // 4, generator=torch.Generator().manual_seed(1))
    ]
    own = "importance_dtype" in dtypes
    betas = (0.9, 0.99 if own else plan.beta)
    p = torch.nn.Parameter(torch.zeros(n))
    optimizer = MaskedEMAAdamW(
        [p], lr=0.0, weight_decay=0.0, betas=betas, importance_beta=plan.beta if own else None, isolation_ratio=0.5,
        mask_interval=plan.interval, seed=plan.seed, backend="cpu", **dtypes,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(plan.seed)
    left, entered = (torch.zeros(n // 4, dtype=torch.int32) for _ in range(2))
    shares = []
    p.grad = size / (1 - plan.beta) ** 0.5  # one step, and the importance is size squared
    for refresh in range(plan.settled + plan.without + plan.again):
        stopped = 0 <= refresh - plan.settled < plan.without
        now = size * ~stops if stopped else size
        for step in range(plan.interval):
            if refresh or step:
                p.grad = now * torch.randn(n, generator=generator) if plan.random else now
            optimizer.step()
        isolated = optimizer.isolation_mask(p)[stops]
        if refresh >= plan.settled - 1:
            shares.append(float(isolated.float().mean()))
        after = refresh - plan.settled + 1
        if 0 < after <= plan.without:
            left[(left == 0) & ~isolated] = after
        elif after > plan.without:
            entered[(entered == 0) & isolated] = after - plan.without
    return Times(left, entered, shares)


def _summary(found: Tensor, base: Tensor) -> dict[str, float]:
    """Refreshes; ``apart``: the share of elements more than one refresh from the same element of ``base``."""
    times = found[found > 0].double()
    return {
        "mean": float(times.mean()),
        "sd": float(times.std()),
        "first": int(times.min()),
        "last": int(times.max()),
        "later": int((found == 0).sum()),  # than the run lasts; not in the figures above
        "apart": float(((found - base).abs() > 1).double().mean()),
    }


def record(plan: Plan = Plan()) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    base: Times | None = None
    for name, dtypes in CONFIGURATIONS.items():
        one = replace(plan, seed=plan.seed + 1) if name == OTHER_GRADIENTS else plan
        times = run(one, **dtypes)
        base = base or times
        rows.append(
            {
                "configuration": name,
                "left": _summary(times.left, base.left),
                "entered": _summary(times.entered, base.entered),
                "shares": times.shares,
            }
        )
    return results.provenance() | {"plan": asdict(plan), "rows": rows}


def text(folder: Path = results.RESULTS) -> str:
    """The README's block."""
    found = results.newest_record(folder, PREFIX)
    if found is None:
        return "Not measured yet: `make stopped`."
    plan = Plan(**found["plan"])
    lines = []
    for row in found["rows"]:
        line = [row["configuration"]]
        for side in ("left", "entered"):
            t = row[side]
            line += [
                f"{t['mean']:.1f} ± {t['sd']:.1f}",
                f"{t['first']} to {t['last']}" + (f", {count(t['later'])} later" if t["later"] else ""),
                "-" if row["configuration"] == BASE else f"{100 * t['apart']:.0f} %",
            ]
        lines.append(line)
    header = ["statistics", "leave after, refreshes", "from, to", "more than one from float32's"]
    header += ["enter again after", "from, to", "more than one from float32's"]
    caption = (
        f"{count(plan.elements // 4)} elements whose gradient stops and, {plan.without} refreshes later, returns, beside "
        f"neighbours up to three times larger; beta {plan.beta}, a refresh every {plan.interval} steps; mean and standard "
        f"deviation, commit {found['commit']}" + (" with uncommitted changes" if found["dirty"] else "") + "."
    )
    return caption + "\n\n" + table(header, lines, "lrrrrrr")


def main() -> int:
    results.record_rows(record(), PREFIX)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
