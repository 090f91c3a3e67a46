"""Stage 2: S(i, j) = |C_i and C_j| / |C_i or C_j| by counting the bits of packed masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .core_file import CoreSource, byte_slices, open_core, require_same_model

_BITS_OF_BYTE = torch.tensor([bin(byte).count("1") for byte in range(256)], device="cpu")


def popcount(packed: Tensor) -> int:
    """Bits that are set in a uint8 tensor."""
    return int(torch.bincount(packed.reshape(-1), minlength=256) @ _BITS_OF_BYTE)


def jaccard(intersection: int, size: int, other: int) -> float:
    """Of two sets of these sizes; 1 for two empty ones."""
    union = size + other - intersection
    return intersection / union if union else 1.0


def intersections(sources: Sequence[CoreSource]) -> list[list[int]]:
    """|C_i and C_j| of every pair; |C_i| on the diagonal. Raises IsolationError for cores of different models."""
    cores = [open_core(one) for one in sources]
    require_same_model(cores)
    counts = [[0] * len(cores) for _ in cores]
    for name, begin, end in byte_slices(cores[0]) if cores else ():
        masks = [core.packed(name, begin, end) for core in cores]
        for i, mask in enumerate(masks):
            for j in range(i + 1):
                counts[i][j] += popcount(mask & masks[j])
    return [[counts[max(i, j)][min(i, j)] for j in range(len(cores))] for i in range(len(cores))]


def jaccard_matrix(cores: Sequence[CoreSource]) -> list[list[float]]:
    """S(i, j) for every pair of core regions, or files of them; symmetric, 1 on the diagonal.

    Raises:
        IsolationError (a ValueError): cores of different models.
    """
    return similarity_of(intersections(cores))


def similarity_of(counts: Sequence[Sequence[int]]) -> list[list[float]]:
    """The same from `intersections`."""
    tasks = range(len(counts))
    return [[jaccard(counts[i][j], counts[i][i], counts[j][j]) for j in tasks] for i in tasks]
