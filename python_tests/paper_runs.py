"""The paper preset from the command line at toy size: how it is called, and what is left of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from epi_kernels import cli
from epi_kernels.repro.contents import contents, with_contents
from epi_kernels.repro.preset import Preset, load_preset
from epi_kernels.repro.store import MANIFEST
from epi_kernels.repro.sweep import Plan
from epi_kernels.repro.tables import TABLES
from python_tests.judge_endpoint import completion
from python_tests.paper_preset import toy
from python_tests.threads import on_threads

LLAMA = "LLaMA-2-7B"
GOOD = completion("Fair.\nRating: [[7]]")


def reproduce(preset: Path, out: Path, *arguments: object) -> int:
    line = ["reproduce", "--preset", preset, "--out", out, "--device", "cpu", "--workers", 1, *arguments]
    with on_threads(1):
        return cli.main([str(one) for one in line])


def one_arm(models: dict[str, Path], data: dict[str, Path], url: str, **changes: Any) -> dict[str, Any]:
    """One model, one pair, one arm: a base, a first stage, two of full SFT, one of EPI."""
    preset = toy({LLAMA: models[LLAMA]}, data, url, tables=["cpift-2"])
    arms = preset["sequential"]["arms"]
    preset["sequential"]["arms"] = {"EPI": arms["EPI"]}
    preset["sequential"]["pairs"] = preset["sequential"]["pairs"][:1]
    preset["tasks"] = {name: preset["tasks"][name] for name in ("gsm8k", "alpaca")}
    for plan in ("mixture", "imbalance", "drift", "sweep"):
        del preset[plan]
    return preset | changes


def manifests(out: Path) -> dict[str, int]:
    """Of finished runs, when they were written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob(f"runs/*/{MANIFEST}")}


def runs_of(preset: Path, table: str = "cpift-2") -> Plan:
    return Plan.of(TABLES[table].runs(stamped(preset)))


def stamped(path: Path) -> Preset:
    """As the command reads it."""
    preset = load_preset(str(path))
    return with_contents(preset, contents(preset, path.parent / "digests"))
