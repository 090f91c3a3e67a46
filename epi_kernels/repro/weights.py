"""Runs that make weights from weights: interpolation, core regions, fusion. Checkpoints are read slice by slice, so that
a 7B model is in memory once, when what was made is evaluated."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from epi_kernels.isolation import FusionReport, fuse_checkpoints, save_core
from epi_kernels.repro.models import load_model, tokenizer_of
from epi_kernels.repro.runs import Fuse, Interpolate, Run, Train, base_of, key
from epi_kernels.repro.store import Store
from epi_kernels.repro.workshop import Result, Workshop, model_writer, scores_of


def run_interpolate(run: Interpolate, shop: Workshop) -> Result:
    before, after = shop.store.weights(run.before), shop.store.weights(run.after)
    return _made(run, shop, partial(fuse_checkpoints, before, [after], [], method="linear", omega=run.alpha))[
        0
    ]


def core_of(probe: Run, ratio: float, shop: Workshop) -> Path:
    """The file of a probe run's core region: counted once, kept beside its weights. A call of all ranks."""
    assert isinstance(probe, Train), "a core is what a stage moved"
    return shop.ranks.first_does(_core_of, probe, ratio, shop.store)


def _core_of(probe: Train, ratio: float, store: Store) -> Path:
    path = store.at(probe) / f"core-{ratio:g}.safetensors"
    with store.claim(probe):
        if not path.is_file():
            save_core(store.weights(probe.before), store.weights(probe), path, ratio)
    return path


def run_fuse(run: Fuse, shop: Workshop) -> Result:
    probes = [shop.store.weights(probe) for probe in run.probes]
    cores = [core_of(probe, run.core_ratio, shop) for probe in run.probes]
    backbone = shop.store.weights(run.backbone)
    fuse = partial(fuse_checkpoints, backbone, probes, cores, method=run.method, omega=run.omega)
    result, report = _made(run, shop, fuse)
    result.facts["notes"] = {
        "on_the_sphere": report.slerp,
        "linear": report.linear,
        "core_elements": report.core_elements,
    }
    return result


def _made(
    run: Interpolate | Fuse, shop: Workshop, make: Callable[..., FusionReport]
) -> tuple[Result, FusionReport]:
    """Evaluates the checkpoint that `make` writes at `out`; it is gone once it is loaded. A call of all ranks."""
    spec, tokenizer = base_of(run).model, tokenizer_of(base_of(run).model)
    target = shop.store.folder / f"{key(run)}.fused"
    try:
        report = shop.ranks.first_does(_anew, make, target)
        model: Any = shop.ranks.together(load_model, target, spec, shop.device)
    finally:
        if shop.ranks.first:
            shutil.rmtree(target, ignore_errors=True)
    scores = scores_of(model, tokenizer, run.evaluate, run.seed, shop)
    return Result(*scores, model_writer(model, tokenizer)), report


def _anew(make: Callable[..., FusionReport], target: Path) -> FusionReport:
    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed
    return make(out=target)
