"""Packed masks: uint8, logical row-major order, least-significant bit first, padding bits 0."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(n_elements: int) -> int:
    return (n_elements + 7) // 8


def pack(mask: Tensor) -> Tensor:
    """bool of any shape -> uint8 [ceil(n / 8)]."""
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (flat.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def unpack(packed: Tensor, n_elements: int) -> Tensor:
    """uint8 [ceil(n / 8)] -> bool [n]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(1) >> shifts) & 1
    return bits.view(-1)[:n_elements].bool()
