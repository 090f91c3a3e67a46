"""Runs of neighbouring elements that have state, where a persistent mask takes it from the others.

Blocks of 64 elements have state or none, whole: mask bytes, 8-bit codes and their scales are then those of a tensor that
has all of its state. What has state lies end to end in it, in the order of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from torch import Tensor

from epi_kernels.reference import codec
from epi_kernels.reference.tensors import ParamTensors

BLOCK = codec.BLOCK


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


def places(runs: np.ndarray) -> np.ndarray:
    """[r] int64: where each run begins among the elements that have state; multiples of 64."""
    return np.cumsum(runs[:, 1]) - runs[:, 1]



def pieces(item: ParamTensors) -> Iterator[ParamTensors]:
    """Every run as a parameter by itself: views. ``param``, ``grad`` and ``weight_correction`` are row-major."""
    if item.runs is None:
        yield item
        return

    def cut(tensor: Tensor | None, at: int, count: int, elements: int = 1) -> Tensor | None:
        return None if tensor is None else tensor.view(-1)[at // elements : -(-(at + count) // elements)]

    for (start, count), at in zip(item.runs.tolist(), places(item.runs).tolist(), strict=True):
        yield replace(
            item,
            param=cut(item.param, start, count),
            grad=cut(item.grad, start, count),
            weight_correction=cut(item.weight_correction, start, count),
            exp_avg=cut(item.exp_avg, at, count),
            exp_avg_sq=cut(item.exp_avg_sq, at, count),
            importance=cut(item.importance, at, count),
            isolation_mask=cut(item.isolation_mask, at, count, 8),
            persistent_mask=cut(item.persistent_mask, at, count, 8),
            exp_avg_scale=cut(item.exp_avg_scale, at, count, BLOCK),
            exp_avg_sq_scale=cut(item.exp_avg_sq_scale, at, count, BLOCK),
            importance_scale=cut(item.importance_scale, at, count, BLOCK),
            index_offset=item.index_offset + start,
            runs=None,
        )
