"""CPI-FT's formulas in numpy, float64, whole vectors and sorts: what `epi_kernels.isolation` must agree with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]


def make_model(
    seed: int, shapes: dict[str, tuple[int, ...]], dtype=torch.float32, around: Tensors | None = None
) -> Tensors:
    """Random tensors; with `around`, near those: what a fine-tuning run might have made of them."""
    rng = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    if around is not None:
        drawn = {name: around[name].float() + 0.3 * one for name, one in drawn.items()}
    return {name: one.to(dtype) for name, one in drawn.items()}


def flat(tensors: Tensors) -> np.ndarray:
    """theta, a vector over all parameters in the order of their names in the dict, float64."""
    return np.concatenate([one.detach().double().numpy().reshape(-1) for one in tensors.values()])


def core(base: Tensors, tuned: Tensors, ratio: float) -> np.ndarray:
    """C_i as bools over theta: the floor(p D) largest |theta_i - theta_0| (float32), ties in, the unmoved out."""
    before, after = flat(base), flat(tuned)
    if any(one.dtype == torch.float64 for one in (*base.values(), *tuned.values())):
        moved = np.abs(after - before).astype(np.float32)
    else:
        moved = np.abs(after.astype(np.float32) - before.astype(np.float32))
    k = math.floor(ratio * moved.size)
    if k == 0:
        return np.zeros(moved.size, dtype=bool)
    threshold = np.sort(moved)[::-1][k - 1]
    return (moved >= threshold) & (moved > 0)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    both, either = set(np.flatnonzero(one)) & set(np.flatnonzero(other)), set(np.flatnonzero(one | other))
    return len(both) / len(either) if either else 1.0


def components(similarity: Sequence[Sequence[float]], tau: float) -> list[list[int]]:
    """By the transitive closure of the graph, as a matrix."""
    reach = np.array(similarity, dtype=float).reshape(len(similarity), len(similarity)) >= tau
    reach |= np.eye(len(reach), dtype=bool)
    for _ in range(len(reach)):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    return [sorted(group) for group in sorted({tuple(np.flatnonzero(row)) for row in reach})]


def slerp(before: np.ndarray, after: np.ndarray, omega: float, eps: float) -> np.ndarray:
    norms = np.linalg.norm(before), np.linalg.norm(after)
    if 0.0 in norms:
        return (1 - omega) * before + omega * after
    angle = np.arccos(np.clip((before / norms[0]) @ (after / norms[1]), -1, 1))
    if angle < eps or np.pi - angle < max(eps, 1e-6):
        return (1 - omega) * before + omega * after
    return (np.sin((1 - omega) * angle) * before + np.sin(omega * angle) * after) / np.sin(angle)


def fuse(
    base: Tensors,
    tuned: Sequence[Tensors],
    cores: Sequence[np.ndarray],
    method: str,
    omega: float | None,
    eps: float,
) -> dict[str, np.ndarray]:
    """Every tensor of the fused model, float64, flat."""
    fused, at = {}, 0
    for name, first in base.items():
        values = first.double().numpy().reshape(-1)
        tasks = [one[name].double().numpy().reshape(-1) for one in tuned]
        for i, task in enumerate(tasks):
            share = 1 / (i + 2) if omega is None else omega
            linear = (1 - share) * values + share * task
            values = linear if method == "linear" else slerp(values, task, share, eps)
        for chosen, task in zip(cores, tasks):
            inside = chosen[at : at + values.size]
            values = np.where(inside, task, values)
        fused[name] = values
        at += values.size
    return fused


def smallest_frozen(groups: list[list[int]], cores: Sequence[np.ndarray]) -> list[list[int]]:
    """Group by group the one whose cores leave the least frozen."""
    ordered: list[list[int]] = []
    left = list(groups)
    while left:
        frozen = list(itertools.chain(*ordered))
        sizes = [int(np.any([cores[task] for task in (*frozen, *group)], axis=0).sum()) for group in left]
        ordered.append(left.pop(sizes.index(min(sizes))))
    return ordered
