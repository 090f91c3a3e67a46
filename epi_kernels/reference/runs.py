"""Runs of neighbouring elements that have state, where a persistent mask takes it from the others.

Blocks of 64 elements have state or none, whole: mask bytes, 8-bit codes and their scales are then those of a tensor that
has all of its state. What has state lies end to end in it, in the order of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from epi_kernels.reference import codec
from epi_kernels.reference.tensors import ParamTensors

BLOCK = codec.BLOCK
BYTES_A_RUN = 16  # of ``runs``, as they are kept
# A run is a row of the kernels' table on the host, 19 words in two copies: it has to save more than that.
_RUN_COSTS_ELEMENTS = 256

# elements of the parameter that an entry of the tensor stands for
_OF_THE_WEIGHT = {"param": 1, "grad": 1, "weight_correction": 1}
_ELEMENTS_OF = {
    **_OF_THE_WEIGHT,
    **dict.fromkeys(("exp_avg", "exp_avg_sq", "importance"), 1),
    **dict.fromkeys(("exp_avg_scale", "exp_avg_sq_scale", "importance_scale"), BLOCK),
    **dict.fromkeys(("isolation_mask", "persistent_mask"), 8),
}


def find_runs(persistent_mask: Tensor, n_elements: int) -> np.ndarray:
    """[r, 2] int64, first element and number: the longest runs of blocks that hold anything not in a packed mask."""
    mask = persistent_mask.to("cpu", copy=True).numpy()
    if n_elements % 8:
        mask[-1] |= 0xFF << n_elements % 8 & 0xFF  # past the last element nothing moves
    block_bytes = BLOCK // 8
    mask = np.pad(mask, (0, -len(mask) % block_bytes), constant_values=0xFF)
    movable = (mask.reshape(-1, block_bytes) != 0xFF).any(axis=1)
    edges = np.flatnonzero(np.diff(movable.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    bounds = np.minimum(edges.astype(np.int64) * BLOCK, n_elements)
    return np.stack([bounds[:, 0], bounds[:, 1] - bounds[:, 0]], axis=1)


def stored_elements(runs: np.ndarray) -> int:
    return int(runs[:, 1].sum())


def pays(n_stored: int, n_runs: int, n_elements: int) -> bool:
    """Whether so many elements in so many runs are to be kept by themselves."""
    return n_stored + _RUN_COSTS_ELEMENTS * n_runs < n_elements


def places(runs: np.ndarray) -> np.ndarray:
    """[r] int64: where each run begins among the elements that have state; multiples of 64."""
    return np.cumsum(runs[:, 1]) - runs[:, 1]


def pieces(item: ParamTensors, *, of_weight: bool = True) -> Iterator[ParamTensors]:
    """Every run as a parameter by itself: views, where a tensor is row-major. Without ``of_weight`` what is the weight's
    stays whole, and the run is the only one of it."""
    if item.runs is None:
        yield item
        return
    names = [name for name in _ELEMENTS_OF if of_weight or name not in _OF_THE_WEIGHT]
    flat = {name: one.reshape(-1) for name in names if (one := getattr(item, name)) is not None}
    for (start, count), at in zip(item.runs.tolist(), places(item.runs).tolist(), strict=True):
        cut: dict[str, Any] = {}
        for name, one in flat.items():
            begin, elements = start if name in _OF_THE_WEIGHT else at, _ELEMENTS_OF[name]
            cut[name] = one[begin // elements : -(-(begin + count) // elements)]
        runs = None if of_weight else np.array([[start, count]], dtype=np.int64)
        yield replace(item, **cut, index_offset=item.index_offset + start, runs=runs)
