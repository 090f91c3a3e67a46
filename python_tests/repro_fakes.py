"""A made-up preset and manifests of runs that were never made: what tests of the tables start from."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from epi_kernels.repro.manifest import Bytes, Manifest, StepTime
from epi_kernels.repro.preset import Preset
from epi_kernels.repro.runs import Run, key
from epi_kernels.repro.tables.base import Table

FULL_MARK = {"strings": 10.0}  # the others' is 100
Score = Callable[[Run, str], float]


def fake_task(spec: Any, seed: int = 0) -> Any:
    mark = FULL_MARK.get(spec.kind, 100.0)
    return SimpleNamespace(full_mark=mark, metric="points" if mark == 10 else "exact match, %")


def recipe(**changes: Any) -> dict[str, Any]:
    return {"lr": 1e-3, "steps": 40, "batch": 8, **changes}


def forgetting(first: str, second: str, method: dict[str, Any]) -> dict[str, Any]:
    """A plan of one pair and one arm."""
    pair = {"first": first, "second": second, "learn": recipe(), "adapt": recipe(steps=20)}
    return {
        "pairs": [pair],
        "full_lrs": [1e-3, 1e-4],
        "alphas": [0.5],
        "arms": {"EPI": {"tries": [{"method": method}]}},
    }


def two_rates(method: dict[str, Any]) -> dict[str, Any]:
    """An arm with two tries."""
    return {"tries": [{"method": method}, {"method": method, "lr": 5e-4}]}


def make_preset(**changes: Any) -> Preset:
    cpift = {
        "probe": recipe(steps=10),
        "stage": recipe(steps=20),
        "consolidation": recipe(steps=5),
        "taus": [0.0, 0.5],
        "ratios": [0.05],
    }
    epi = {"name": "epi", "ratio": 0.2, "interval": 10}
    tasks = {kind: {"kind": kind} for kind in ("sums", "strings", "topics", "spans")}
    described: dict[str, Any] = {
        "name": "made-up",
        "seeds": [1, 2, 3],
        "models": {
            "tiny": {"config": {"model_type": "llama", "hidden_size": 8}},
            "small": {"config": {"model_type": "qwen2"}},
        },
        "pretrain": recipe(steps=100),
        "tasks": tasks,
        "sequential": {
            "pairs": [
                {"first": "sums", "second": "strings", "learn": recipe(), "adapt": recipe(steps=20)},
                {"first": "strings", "second": "sums", "learn": recipe(), "adapt": recipe(steps=30)},
            ],
            "full_lrs": [1e-3, 1e-4],
            "alphas": [0.5],
            "arms": {
                "EPI": {"tries": [{"method": epi}, {"method": {**epi, "ratio": 0.1}, "lr": 5e-4}]},
                "static": two_rates({"name": "static", "ratio": 0.2}),
                "EWC": two_rates({"name": "ewc"}),
                "published": two_rates({"name": "published", "ratio": 0.2}),
            },
        },
        "mixture": {
            "tasks": ["sums", "strings", "topics"],
            "recipe": recipe(steps=41),
            "arms": {
                "EPI": {"tries": [{"method": {**epi, "carry": False}}]},
                "static": {"tries": [{"method": {"name": "static", "ratio": 0.2}}]},
            },
            "random_stages": 2,
            "heuristic": [["sums", "topics"], ["strings"]],
            "cpift": cpift,
        },
        "imbalance": {
            "tasks": ["sums", "topics", "spans"],
            "shares": [1.0, 0.1],
            "recipe": recipe(),
            "arms": {"EPI": {"tries": [{"method": {**epi, "carry": False}}]}},
            "cpift": cpift,
        },
        "sweep": {
            "of": "EPI",
            "ratios": [0.1, 0.2, 0.4],
            "intervals": [5],
            "betas": [0.9, 0.99],
            "windows": [5],
            "schedules": ["cosine", "constant"],
            "accumulations": [1, 8],
            "clips": [1.0, None],
        },
        "drift": {"tasks": ["sums", "topics"], "recipe": recipe(), "ratios": [0.01, 0.1], "every": 20},
        "low_resource": {"tasks": tasks, "sequential": forgetting("sums", "strings", epi)},
        "vision": {
            "models": {"sees": {"config": {"model_type": "llava", "vision_config": {}}}},
            "tasks": {kind: {"kind": kind} for kind in ("shapes", "places")},
            "sequential": forgetting("shapes", "places", epi),
        },
    }
    return Preset.model_validate(described | changes)


def overlaps(step: int) -> dict[str, Any]:
    """A point of the observer "drift"."""
    names = ("all", "q", "embedding")
    values = {
        "ceiling": 0.8,
        "from_start": 1 - step / 80,
        "from_start_other": 0.8 - step / 80,
        "chance": 0.05,
        "share": 0.1,
    }
    return {"step": step} | {name: dict.fromkeys(names, value) for name, value in values.items()}


def conflict(tasks: int, score: float, free: float, steps: int) -> dict[str, Any]:
    """Points of the observer "conflict": at a run's start it is 10 points more."""

    def found(score: float) -> dict[str, Any]:
        cosines = [[1.0 if i == j else -score / 100 for j in range(tasks)] for i in range(tasks)]
        return {"score": score, "share": 100.0, "cosines": cosines}

    points = [
        {"step": step, "all": found(score + more), "free": found(free + more)}
        for step, more in ((0, 10.0), (steps // 2, 0.0), (steps - 1, 0.0))
    ]
    return {"tasks": ["?"] * tasks, "points": points}


def stability(seed: int) -> dict[str, Any]:
    names = ("loss", "validation", "grad_norm", "update")
    rows = [{"step": step} | dict.fromkeys(names, 1.0 + 0.01 * step) for step in range(1, 21)]
    means = {"before": dict.fromkeys(names, 1.1), "after": dict.fromkeys(names, 1.2)}
    events = [
        {"step": 10, "kind": "refresh", "half": 2, **means},
        {"step": 5, "kind": "placebo", "half": 2, **means},
    ]
    mean = {
        kind: dict.fromkeys(names, 1 + rise + 0.001 * seed) | {"n": 1}
        for kind, rise in (("refresh", 0.02), ("placebo", 0.01))
    }
    return {"window": 2, "rows": rows, "events": events, "mean": mean}


def manifest(run: Run, scores: dict[str, float], **changes: Any) -> Manifest:
    seed, kind = getattr(run, "seed", 0), run.kind
    method = getattr(getattr(run, "method", None), "name", "")
    observed: dict[str, Any] = {}
    for text in getattr(run, "observe", ()):
        name = text.partition(":")[0]
        if name == "drift":
            observed[name] = {"ratios": {p: [overlaps(at) for at in (0, 20, 40)] for p in ("0.01", "0.1")}}
        elif name == "conflict":
            score = {"epi": 5.0 + 0.1 * seed}.get(method, 8.0)
            free = {"epi": 4.0, "static": 9.0}.get(method, score)
            observed[name] = conflict(len(run.tasks), score, free, run.recipe.steps)
        else:
            observed[name] = stability(seed)
    state = {"published": 1300, "epi": 813}.get(method, 800)
    trained = kind in ("train", "cpift")
    fields: dict[str, Any] = {
        "key": key(run),
        "run": run,
        "seed": seed,
        "commit": None,
        "versions": {},
        "machine": {"cpu": "none"},
        "finished": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "scores": scores,
        "bytes": Bytes(parameters=100, weights=400, optimizer={"total": state}, peak=2**20)
        if trained
        else None,
        "time": StepTime(
            optimizer_p20=1,
            optimizer_p50={"published": 3.0, "epi": 1.0}.get(method, 0.9) * (1 + 0.01 * seed),
            optimizer_p80=4,
            training_p50=9,
            steps=10,
        )
        if trained
        else None,
        "series": observed,
        "notes": {"groups": [["sums"], ["strings"]]}
        if kind == "cpift"
        else {"steps": run.recipe.steps}
        if kind == "train"
        else {},
    }
    return Manifest(**(fields | changes))


def manifests(table: Table, preset: Preset, score: Score) -> dict[str, Manifest]:
    """Of every run of a table."""
    found = {}
    for run in table.runs(preset):
        found[key(run)] = manifest(run, {spec.kind: score(run, spec.kind) for spec in run.evaluate})
    return found
