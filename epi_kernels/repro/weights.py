"""Runs that make weights from weights: interpolation, core regions, fusion. Checkpoints are read slice by slice, so that
a 7B model is in memory once, when what was made is evaluated."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from epi_kernels.isolation import FusionReport, fuse_checkpoints, save_core
from epi_kernels.repro.models import load_model, tokenizer_of
from epi_kernels.repro.runs import Fuse, Interpolate, Run, Train, base_of, key
from epi_kernels.repro.workshop import Result, Workshop, model_writer, scores_of


def run_interpolate(run: Interpolate, shop: Workshop) -> Result:
    before, after = shop.store.weights(run.before), shop.store.weights(run.after)

    def make(target: Path) -> FusionReport:
        return fuse_checkpoints(before, [after], [], target, method="linear", omega=run.alpha)

    return _made(run, shop, make)[0]


def core_of(probe: Run, ratio: float, shop: Workshop) -> Path:
    """The file of a probe run's core region: counted once, kept beside its weights."""
    assert isinstance(probe, Train), "a core is what a stage moved"
    path = shop.store.at(probe) / f"core-{ratio:g}.safetensors"
    with shop.store.claim(probe):
        if not path.is_file():
            save_core(shop.store.weights(probe.before), shop.store.weights(probe), path, ratio)
    return path


def run_fuse(run: Fuse, shop: Workshop) -> Result:
    probes = [shop.store.weights(probe) for probe in run.probes]
    cores = [core_of(probe, run.core_ratio, shop) for probe in run.probes]

    def make(target: Path) -> FusionReport:
        backbone = shop.store.weights(run.backbone)
        return fuse_checkpoints(backbone, probes, cores, target, method=run.method, omega=run.omega)

    result, report = _made(run, shop, make)
    result.facts["notes"] = {
        "on_the_sphere": report.slerp,
        "linear": report.linear,
        "core_elements": report.core_elements,
    }
    return result


def _made(
    run: Interpolate | Fuse, shop: Workshop, make: Callable[[Path], FusionReport]
) -> tuple[Result, FusionReport]:
    """Evaluates the checkpoint that `make` writes; it is gone once it is loaded."""
    spec = base_of(run).model
    target = shop.store.folder / f"{key(run)}.fused"
    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed
    try:
        report = make(target)
        model: Any = load_model(target, spec, shop.device)
    finally:
        shutil.rmtree(target, ignore_errors=True)
    tokenizer = tokenizer_of(spec)
    scores = scores_of(model, tokenizer, run.evaluate, run.seed, shop)
    return Result(*scores, model_writer(model, tokenizer)), report
