"""What a stage takes over from the run before: `isolation.safetensors` beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from epi_kernels.integrations.groups import parameter_names
from epi_kernels.optim import MaskedEMAAdamW
from epi_kernels.optim.exchange import load_isolation
from epi_kernels.optim.exchange_file import SavedIsolation, read
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.stage import Stage

FILE = "isolation.safetensors"


def isolation_file(stage: Stage, method: str) -> Path:
    """Raises ReproError where the run before left none; `method` is who asks."""
    if stage.before is None:
        raise ReproError(f"{method}: carries importance over, and there is no run before this stage")
    path = stage.before / FILE
    if not path.is_file():
        raise ReproError(
            f"{method}: the run in {stage.before} has no {FILE} to carry importance over from: train that stage with "
            '{"name": "full", "optimizer": "epi"}, or set carry to false where the method has it'
        )
    return path


def carry_over(optimizer: MaskedEMAAdamW, stage: Stage, method: str) -> None:
    """The optimizer starts from the importance of the run before, without its masks. Raises ReproError."""
    path = isolation_file(stage, method)
    try:
        load_isolation(optimizer, path, masks=False)
    except ValueError as error:
        raise ReproError(f"{method}: {error}") from None


def carried_importance(stage: Stage, method: str, *, mean: bool = False) -> dict[str, Tensor]:
    """Importance of the run before: fp32, of the shapes of the stage's parameters, by name, on their devices.

    As EPI carries it: an average that began at zero. With `mean` it is divided by 1 - beta^step, which makes it the mean
    squared gradient. Zeros where a parameter was never stepped. Raises ReproError.
    """
    path = isolation_file(stage, method)
    wanted = {name: param for param, name in parameter_names(stage.model).items() if param.requires_grad}
    try:
        saved = read(path)
    except ValueError as error:
        raise ReproError(f"{method}: {error}") from None
    _check_same_model(method, path, wanted, saved)
    found = {}
    for name, param in wanted.items():
        one = saved.parameters[name]
        if one.importance is None:
            found[name] = torch.zeros(one.shape, device=param.device)
            continue
        # a copy: the file is mapped
        found[name] = one.importance.to(param.device, torch.float32, copy=True)
        if mean and one.step:
            found[name] /= 1 - one.beta**one.step
    return found


def _check_same_model(method: str, path: Path, wanted: Mapping[str, Tensor], saved: SavedIsolation) -> None:
    for name, param in wanted.items():
        there = saved.parameters.get(name)
        if there is None or there.shape != param.shape:
            what = "is not in it" if there is None else f"is {list(there.shape)} in it"
            raise ReproError(
                f"{method}: {path} is of another model: {name}, {list(param.shape)} here, {what}"
            )
