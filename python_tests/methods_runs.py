"""Stages of a tiny model, trained as the harness trains: what the tests of repro's methods share."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from epi_kernels import save_isolation
from epi_kernels.optim import exchange
from epi_kernels.repro.config import Recipe
from epi_kernels.repro.methods import config as configs
from epi_kernels.repro.methods import make_method
from epi_kernels.repro.methods.published import PublishedEPI
from epi_kernels.repro.stage import Batch, Stage
from python_tests.threads import on_threads
from python_tests.tiny_model import tiny_llama

SMALL = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
RECIPE = Recipe(lr=1e-2, steps=4, batch=6, weight_decay=0.1)
P = 0.1  # isolated, of all elements
MASKING = {
    "epi": configs.Epi(ratio=P, interval=2),
    "epi-own-importance": configs.Epi(
        ratio=P, interval=2, importance_beta=0.9, by_block=True, hysteresis=0.1
    ),
    "epi-cold": configs.Epi(ratio=P, interval=1, carry=False, normalization="none", scope="layer"),
    "epi-core": configs.Epi(ratio=P, interval=2, core=0.05),
    "epi-adaptive": configs.Epi(ratio=P, interval=1, adaptive=True, state_dtype="bfloat16"),
    "published": configs.PublishedEpi(ratio=P, interval=2),
    "window": configs.Window(ratio=P, interval=2, window=3),
    "static-g2": configs.Static(ratio=P),
    "static-delta": configs.Static(by="delta", ratio=P, carry=False),
    "random": configs.RandomMask(ratio=P, interval=2),
    "inverted": configs.Inverted(ratio=P, interval=2),
}
OTHERS = {
    "full": configs.Full(),
    "full-epi": configs.Full(optimizer="epi"),
    "full-moments": configs.Full(optimizer="epi", keep_moments=True),
    "ewc": configs.Ewc(strength=0.5),
    "l2sp": configs.L2Sp(strength=0.5),
    "replay": configs.Replay(share=0.2),
    "lora": configs.Lora(rank=2),
    "mofo": configs.Mofo(fraction=0.2),
    "pcgrad": configs.PcGrad(share=0.2),
}


class Folders(NamedTuple):
    """Runs: weights as they began, a stage on them that keeps its importance, and one that keeps none."""

    origin: Path
    before: Path
    without: Path


def make_folders(root: Path) -> Folders:
    folders = Folders(root / "origin", root / "before", root / "without")
    model = tiny_llama(0, **SMALL)
    model.save_pretrained(folders.origin)
    stage = Stage(model, RECIPE, 4, 0, torch.device("cpu"), ("first",), folders.origin)
    method = begin(configs.Full(optimizer="epi"), stage)
    train(method, range(4), seed=1)
    for folder in (folders.before, folders.without):
        method.finish().save_pretrained(folder)
    save_isolation(method.optimizer, folders.before / "isolation.safetensors")
    return folders


def make_stage(folders: Folders, *, before: Path | None = None, tasks=("second",), seed: int = 3) -> Stage:
    folder = before or folders.before
    model = tiny_llama(0, **SMALL)
    # the output layer is tied, and not in the file
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return Stage(model, RECIPE, 4, seed, torch.device("cpu"), tasks, folder, folders.origin)


def begin(config: Any, stage: Stage) -> Any:
    stage.method = make_method(config, stage)
    return stage.method


def make_batch(step: int, seed: int = 2, rows: int = 6, tasks: tuple[int, ...] = (0,)) -> Batch:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    ids = torch.randint(SMALL["vocab_size"], (rows, 8), generator=generator)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 2 + row % 3] = -100  # prompts of several lengths
    task = torch.tensor([tasks[row % len(tasks)] for row in range(rows)])
    return Batch(ids, labels, torch.ones_like(ids), task)


def train(method: Any, steps: range, *, seed: int = 2, tasks: tuple[int, ...] = (0,), after=None) -> None:
    """As the harness's loop; ``after(step)`` sees the clipped gradients and the weights after the step."""
    for step in steps:
        method.optimizer.zero_grad()
        batch = make_batch(step, seed, tasks=tasks)
        for part in (slice(0, 3), slice(3, 6)):
            method.backward(batch.rows(part), 0.5)
        method.gather()
        held = [param for group in method.optimizer.param_groups for param in group["params"]]
        torch.nn.utils.clip_grad_norm_(held, 1.0)
        method.step(step)
        if after is not None:
            after(step)


def stop_and_resume(method: Any, config: Any, fresh: Stage) -> Any:
    """What was saved goes through a file; the stage begins anew in `fresh`, whatever weights it has."""
    buffer = io.BytesIO()
    saved = (method.stage.model.state_dict(), method.optimizer.state_dict(), method.state_dict())
    torch.save(saved, buffer)
    buffer.seek(0)
    weights, optimizer, rest = torch.load(buffer, weights_only=True)
    with torch.no_grad():
        for param in fresh.model.parameters():
            param += 1
    resumed = begin(config, fresh)
    resumed.stage.model.load_state_dict(weights)
    resumed.optimizer.load_state_dict(optimizer)
    resumed.load_state_dict(rest)
    return resumed


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return copy.deepcopy(dict(model.state_dict()))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))


def scaled(u: torch.Tensor) -> np.ndarray:
    """Min-max within the tensor, float32 [n]."""
    flat = u.detach().numpy().astype(np.float32).ravel()
    low, high = flat.min(), flat.max()
    return np.zeros_like(flat) if low == high else (flat - low) / (high - low)


def largest(scores: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """bool by name: the `count` largest of all and what ties with the last of them, none that is 0."""
    bound = np.sort(np.concatenate(list(scores.values())))[-count]
    return {name: (one >= bound) & (one > 0) for name, one in scores.items()}


def made_folders(tmp_path_factory) -> Iterator[Folders]:
    """For a fixture of a test module; its tests run on one thread."""
    with on_threads(1):
        yield make_folders(tmp_path_factory.mktemp("runs"))


def masks_of(method) -> dict[str, torch.Tensor]:
    optimizer = method.optimizer
    found = {}
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            if isinstance(optimizer, PublishedEPI):
                state = optimizer.state[param]
                found[name] = (
                    state["isolation_mask"].clone() if state else torch.zeros_like(param, dtype=torch.bool)
                )
            else:
                found[name] = optimizer.isolation_mask(param)
    return found


def counted(masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def elements(method) -> int:
    return sum(param.numel() for group in method.optimizer.param_groups for param in group["params"])


def saved_importance(folders) -> dict[str, torch.Tensor]:
    saved = exchange.read(folders.before / "isolation.safetensors").parameters
    return {name: one.importance.clone() for name, one in saved.items()}
