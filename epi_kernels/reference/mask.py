"""Stage 4, mask: writes the packed mask and counts what changed."""

from __future__ import annotations

import torch
from torch import Tensor

from epi_kernels.reference import bits
from epi_kernels.reference.stats import ScoreTerms, score, slices
from epi_kernels.reference.tensors import ParamTensors

ISOLATED, ENTERED, RELEASED = 0, 1, 2  # columns of the drift counts


def select_(
    tensors: ParamTensors,
    terms: ScoreTerms,
    thresholds: Tensor,  # [layers] fp32: the threshold of the layer's domain, +inf where nothing is selected
    keep_factor: float,
    drift: Tensor,  # [layers, 3] int64, added to
) -> None:
    """isolated = score >= threshold, u > 0, score > 0 (minmax, none), scale > 0; persistent bits OR-ed in."""
    assert tensors.isolation_mask is not None
    row = tensors.layer
    threshold, scale = thresholds[row], terms.scale[row]
    for start, stop in slices(tensors.n_stored):
        packed = tensors.isolation_mask[start // 8 : bits.packed_bytes(stop)]
        old = bits.unpack(packed, stop - start)
        u = tensors.read_u(start, stop)
        scores = score(u, terms.shift[row], scale, old, keep_factor)
        new = (scores >= threshold) & (threshold < torch.inf) & (u > 0) & torch.isfinite(u) & (scale > 0)
        if terms.positive_only:
            new &= scores > 0
        if tensors.persistent_mask is not None:
            persistent = tensors.persistent_mask[start // 8 : bits.packed_bytes(stop)]
            new |= bits.unpack(persistent, stop - start)
        drift[row] += torch.stack([new.sum(), (new & ~old).sum(), (old & ~new).sum()])
        packed.copy_(bits.pack(new))
