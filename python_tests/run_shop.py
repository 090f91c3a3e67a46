"""A workshop for the tests of runs, and what a finished run wrote."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from epi_kernels.repro.runs import key
from epi_kernels.repro.store import Store
from epi_kernels.repro.train import Limits
from epi_kernels.repro.workshop import Workshop

CPU = torch.device("cpu")


def shop(folder, keep=(), limits=None) -> Workshop:
    return Workshop(Store(folder), CPU, limits or Limits(), frozenset(map(key, keep)))


def weights(folder, run):
    return load_file(folder / key(run) / "model.safetensors")


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
