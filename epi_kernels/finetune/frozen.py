"""`--freeze`: core regions (`epi_kernels.isolation`) whose weights never change, as persistent masks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from epi_kernels.isolation.consolidated import freeze, require_cores_of
from epi_kernels.isolation.core_file import CoreFile, byte_slices

from .log import Log
from .options import Options
from .ranks import Ranks


def load(options: Options, net: torch.nn.Module, ranks: Ranks) -> list[CoreFile]:
    """What --freeze names, checked against this model's names and shapes (it may lie on the meta device).

    A call of all ranks. Raises UserError when it is no core region, another model's, or not the same on all ranks.
    """
    if not options.freeze:
        return []
    cores = ranks.together(_checked, options.freeze, net)
    if ranks.size > 1:
        ranks.refuse_differences({"the cores": _digest(cores)}, "give all the same files to --freeze")
    return cores


def _checked(paths: Sequence[str], net: torch.nn.Module) -> list[CoreFile]:
    cores = [CoreFile(path) for path in paths]
    require_cores_of(cores, {name: tuple(parameter.shape) for name, parameter in net.named_parameters()})
    return cores


def _digest(cores: Sequence[CoreFile]) -> str:
    digest = hashlib.sha256()
    for core in cores:
        for name, begin, end in byte_slices(core):
            digest.update(name.encode())
            digest.update(core.packed(name, begin, end).numpy().data)
    return digest.hexdigest()


def install(optimizer: torch.optim.Optimizer, cores: Sequence[CoreFile], ranks: Ranks) -> int:
    """How many weights are frozen from here on."""
    if not cores:
        return 0
    elements = ranks.together(freeze, optimizer, cores)
    print(f"frozen for good: {elements} weights of {len(cores)} core regions")
    return elements


def record(log: Log, cores: Sequence[CoreFile], elements: int) -> None:
    if cores:
        log.write("freeze", step=0, cores=[core.label for core in cores], frozen=elements)
