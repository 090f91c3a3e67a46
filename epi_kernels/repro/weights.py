"""Runs that make weights from weights: interpolation, core regions, fusion."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from epi_kernels.isolation import FusionReport, fuse_checkpoints, save_core
from epi_kernels.repro.config import ModelSpec
from epi_kernels.repro.models import load_model, tokenizer_of
from epi_kernels.repro.runs import Fuse, Interpolate, Run, Train, base_of, key
from epi_kernels.repro.store import Store
from epi_kernels.repro.workshop import Result, Workshop, model_writer, scores_of


def run_interpolate(run: Interpolate, shop: Workshop) -> Result:
    spec = base_of(run).model
    tokenizer = tokenizer_of(spec)
    model = shop.ranks.together(_between, run, spec, shop)
    scores = scores_of(model, tokenizer, run.evaluate, run.seed, shop)
    return Result(*scores, model_writer(model, tokenizer))


def _between(run: Interpolate, spec: ModelSpec, shop: Workshop) -> Any:
    model = load_model(shop.store.weights(run.before), spec, shop.device)
    after = dict(load_model(shop.store.weights(run.after), spec, shop.device).named_parameters())
    with torch.no_grad():
        for name, param in model.named_parameters():  # tied ones once
            param.lerp_(after[name], run.alpha)
    return model


def core_of(probe: Run, ratio: float, shop: Workshop) -> Path:
    """The file of a probe run's core region: counted once, kept beside its weights. A call of all ranks."""
    assert isinstance(probe, Train), "a core is what a stage moved"
    return shop.ranks.first_does(_core_of, probe, ratio, shop.store)


def _core_of(probe: Train, ratio: float, store: Store) -> Path:
    path = store.at(probe) / f"core-{ratio:g}.safetensors"
    if not path.is_file():
        save_core(store.weights(probe.before), store.weights(probe), path, ratio)
    return path


def _fuse(run: Fuse, store: Store, cores: Sequence[Path], target: Path) -> FusionReport:
    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed
    return fuse_checkpoints(
        store.weights(run.backbone),
        [store.weights(probe) for probe in run.probes],
        cores,
        target,
        method=run.method,
        omega=run.omega,
    )


def run_fuse(run: Fuse, shop: Workshop) -> Result:
    spec = base_of(run).model
    target = shop.store.folder / f"{key(run)}.fused"
    cores = [core_of(probe, run.core_ratio, shop) for probe in run.probes]
    report = shop.ranks.first_does(_fuse, run, shop.store, cores, target)
    model = shop.ranks.together(load_model, target, spec, shop.device)
    scores = scores_of(model, tokenizer_of(spec), run.evaluate, run.seed, shop)

    def write(folder: Path) -> None:
        shutil.copytree(target, folder, dirs_exist_ok=True)
        shutil.rmtree(target)

    notes = {"on_the_sphere": report.slerp, "linear": report.linear, "core_elements": report.core_elements}
    return Result(*scores, write, {"notes": notes})
