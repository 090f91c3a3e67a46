"""The outcome of all runs as plain values, ready for JSON: what the table, the page and a program read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from epi_kernels import published
from epi_kernels.demo.protocol import ADAMW, ISOLATION, KEPT, Arm, Settings, StageA, StageB
from epi_kernels.scores import ABOVE, BELOW, INSIDE, Point, chance_jaccard, compare, spread

VERSION = 1


def collect(
    settings: Settings,
    arms: Sequence[Arm],
    stage_a: Sequence[StageA],
    stage_b: Sequence[StageB],
    timing: dict[str, float],
) -> dict[str, Any]:
    before = {one.seed: Point(one.b, one.a) for one in stage_a}
    runs = {(one.seed, one.arm): one for one in stage_b}
    isolation = next(arm for arm in arms if arm.kind == ISOLATION)
    return {
        "version": VERSION,
        "settings": settings.as_dict(),
        "seeds": list(before),
        "learned": all(one.a >= settings.needed_a for one in stage_a),
        "before": [{"seed": one.seed, "a": one.a, "b": one.b} for one in stage_a],
        "before_summary": {"a": _spread([p.a for p in before.values()]), "b": _spread([p.b for p in before.values()])},
        "arms": [_arm(arm, arms, before, runs) for arm in arms],
        "price_on_b": _prices(isolation, arms, before, runs),
        "drift": _drift(settings, [runs[seed, isolation.key] for seed in before]),
        "optimizer_bytes": _bytes(stage_a[0].n_parameters, arms, runs),
        "backend": runs[stage_a[0].seed, isolation.key].backend,
        "timing": timing,
    }  # fmt: skip


def _spread(values: Sequence[float]) -> dict[str, float]:
    return spread(values)._asdict()


def _arm(arm: Arm, arms: Sequence[Arm], before: dict[int, Point], runs: dict) -> dict[str, Any]:
    mine = [runs[seed, arm.key] for seed in before]
    steps = [step for step, _, _ in mine[0].curve]
    return {
        "key": arm.key,
        "label": arm.label,
        "kind": arm.kind,
        "lr": arm.lr,
        "ratio": arm.ratio,
        "runs": [{"seed": one.seed, "a": one.a, "b": one.b} for one in mine],
        "a": _spread([one.a for one in mine]),
        "b": _spread([one.b for one in mine]),
        "gain": None if arm.kind == ADAMW else _gain(ADAMW, arm, arms, before, runs),
        "gain_over_kept": None if arm.kind in (ADAMW, KEPT) else _gain(KEPT, arm, arms, before, runs),
        "curve": [
            {"step": step, "a": _spread([r.curve[i][1] for r in mine]), "b": _spread([r.curve[i][2] for r in mine])}
            for i, step in enumerate(steps)
        ],
    }  # fmt: skip


def _gain(kind: str, arm: Arm, arms: Sequence[Arm], before: dict[int, Point], runs: dict) -> dict[str, Any]:
    """dA@B over the frontier of all arms of `kind`, seed by seed: a run is compared with runs from the same model."""
    against = [other.key for other in arms if other.kind == kind]
    each = []
    for seed, start in before.items():
        run = runs[seed, arm.key]
        full = [Point(runs[seed, key].b, runs[seed, key].a) for key in against]
        each.append(compare(Point(run.b, run.a), full, start))
    return {
        **_spread([one.gain for one in each]),
        "runs": [{"seed": seed, **one._asdict()} for seed, one in zip(before, each)],
        "where": {place: sum(one.where == place for one in each) for place in (INSIDE, BELOW, ABOVE)},
    }


def _prices(isolation: Arm, arms: Sequence[Arm], before: dict[int, Point], runs: dict) -> dict[str, Any]:
    """B of the isolation run less B of each arm without a mask, seed by seed."""
    return {
        arm.key: _spread([runs[seed, isolation.key].b - runs[seed, arm.key].b for seed in before])
        for arm in arms
        if arm.kind in (ADAMW, KEPT)
    }


def _drift(settings: Settings, isolated: Sequence[StageB]) -> dict[str, Any]:
    """Every refresh, over seeds; `layers` are mean percents isolated, by tensor."""
    rows = []
    for at in zip(*(one.refreshes for one in isolated)):
        names = [name for name in at[0] if name not in ("step", "layers")]
        rows.append(
            {
                "step": at[0]["step"],
                **{name: _spread([refresh[name] for refresh in at]) for name in names},
                "layers": {
                    layer: spread([refresh["layers"][layer] for refresh in at]).mean
                    for layer in at[0]["layers"]
                },
            }
        )
    return {"refreshes": rows, "chance": chance_jaccard(settings.ratio)}


def _bytes(n_parameters: int, arms: Sequence[Arm], runs: dict) -> dict[str, Any]:
    """Optimizer state of the first seed; all seeds have the same."""
    size = {run.arm: run.state_bytes for run in reversed(list(runs.values()))}
    return {
        "n_parameters": n_parameters,
        "isolation": next(size[arm.key] for arm in arms if arm.kind == ISOLATION),
        "torch_adamw": next(size[arm.key] for arm in arms if arm.kind == ADAMW),
        "epi_as_published": published.STATE_TOTAL_BYTES * n_parameters,
        "epi_as_published_refresh": published.REFRESH_BYTES * n_parameters,
    }
