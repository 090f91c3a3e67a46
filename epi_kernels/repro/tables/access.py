"""The plans of a preset, or an error that names the one it lacks."""

from __future__ import annotations

from collections.abc import Iterable

from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.preset import DriftPlan, Imbalance, Mixture, Preset, Sequential, Sweep
from epi_kernels.repro.runs import Tasks


class NoPlan(ReproError):
    """The preset has nothing for a table."""


def _lacking(preset: Preset, plan: str, table: str) -> NoPlan:
    return NoPlan(f"--table {table}: preset {preset.name} has no plan `{plan}`")


def sequential_plan(preset: Preset, table: str) -> Sequential:
    if preset.sequential is None or not preset.sequential.pairs:
        raise _lacking(preset, "sequential", table)
    return preset.sequential


def mixture_plan(preset: Preset, table: str) -> Mixture:
    if preset.mixture is None:
        raise _lacking(preset, "mixture", table)
    return preset.mixture


def imbalance_plan(preset: Preset, table: str) -> Imbalance:
    if preset.imbalance is None:
        raise _lacking(preset, "imbalance", table)
    if len(preset.imbalance.tasks) < 2:
        raise ReproError(f"--table {table}: preset {preset.name}: an imbalance takes two tasks or more")
    return preset.imbalance


def drift_plan(preset: Preset, table: str) -> DriftPlan:
    if preset.drift is None:
        raise _lacking(preset, "drift", table)
    return preset.drift


def sweep_plan(preset: Preset, table: str, *fields: str) -> Sweep:
    """The sweep; raises ReproError too when none of `fields` has a value to sweep."""
    if preset.sweep is None:
        raise _lacking(preset, "sweep", table)
    if fields and not any(getattr(preset.sweep, field) for field in fields):
        raise _lacking(preset, "` and no `".join(f"sweep.{field}" for field in fields), table)
    return preset.sweep


def specs(preset: Preset, names: Iterable[str]) -> Tasks:
    """Tasks by the preset's names, each once, in its order. Scores go by kind, so a kind may stand there once."""
    wanted = set(names)
    chosen = tuple(spec for name, spec in preset.tasks.items() if name in wanted)
    kinds = [spec.kind for spec in chosen]
    twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
    if twice:
        raise ReproError(f"preset {preset.name}: two tasks of one plan are of the kind {', '.join(twice)}")
    return chosen
