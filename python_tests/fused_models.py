"""A base, what tasks made of it, and their cores, in memory: of the tests of fusion."""

from __future__ import annotations

import math

import numpy as np
import torch

from python_tests.oracle_isolation import make_model

SHAPES = {"w": (37, 53), "scalar": (), "b": (7,), "empty": (0, 4), "v": (129,), "zero": (5,)}


def models(tasks: int, dtype=torch.float32, seed: int = 0):
    """A base and what tasks made of it: with near-collinear tensors, unlike ones, and one of zeros."""
    base = make_model(seed, SHAPES, dtype)
    base["zero"].zero_()
    tuned = [make_model(seed + 1 + i, SHAPES, dtype, base) for i in range(tasks)]
    for one in tuned:
        one["b"] = (base["b"].float() + 0.01 * one["b"].float()).to(dtype)
    return base, tuned


def split(vector: np.ndarray) -> dict[str, torch.Tensor]:
    """A vector over theta as bools of the parameters' shapes."""
    masks, at = {}, 0
    for name, shape in SHAPES.items():
        n = math.prod(shape)
        masks[name] = torch.from_numpy(vector[at : at + n].copy()).view(shape)
        at += n
    return masks
