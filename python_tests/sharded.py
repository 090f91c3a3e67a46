"""Parameters of awkward shapes, their gradients, and how they are cut: of the tests of sharded optimizers."""

from __future__ import annotations

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

SHAPES = {
    "embedding": (37, 24),  # tied: the model has it twice, the optimizer once
    "block.0.weight": (24, 40),
    "block.0.norm": (24,),
    "block.1.weight": (65, 130),  # above 4,096 elements: 8-bit states are codes
    "block.1.norm": (7,),  # fewer rows than some meshes have ranks, once cut twice
    "experts": (5, 6, 9),
    "bias": (3,),
    "single": (1, 1),
}
REFRESHES = {"isolation_ratio": 0.07, "mask_interval": 3}


def gradient(name: str, step: int, dtype: torch.dtype) -> torch.Tensor:
    rng = np.random.default_rng([step, *name.encode()])
    scale = 10.0 ** rng.integers(-4, 0)
    return torch.from_numpy(rng.standard_normal(SHAPES[name]).astype(np.float32) * scale).to(dtype)


def weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(7)
    return {
        name: torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(dtype)
        for name, shape in SHAPES.items()
    }


def cut(tensor: torch.Tensor, mesh, placements) -> DTensor:
    """This rank's part of a tensor that every rank has; ``distribute_tensor`` does not know strided shards."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    part = tensor[tuple(slice(start, start + n) for start, n in zip(offset, shape))].clone()
    return DTensor.from_local(part, mesh, placements, shape=tensor.shape, stride=tensor.stride())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
