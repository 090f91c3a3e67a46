"""The tensors of one parameter as every stage and backend receives them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from epi_kernels.reference import codec, nibbles
from epi_kernels.reference.scalars import HyperParameters


@dataclass(slots=True)
class ParamTensors:
    """One parameter, its gradient and its state. States are contiguous; param and grad need not be.

    Dtypes: ``grad`` has the parameter's; ``exp_avg`` and ``exp_avg_sq`` share one of float32, bfloat16, uint8
    (float64 on the reference backend); ``importance`` is None when shared with ``exp_avg_sq``, else
    float32, bfloat16 or uint8. uint8 are codes, whose scales lie beside them; other states have none. Scales are
    uint8 of 8-bit codes (``codec.py``) and bfloat16 of 4-bit ones (``nibbles.py``), which are packed, ``exp_avg``
    and ``exp_avg_sq`` alike, and have no importance beside them. ``weight_correction`` (int8 or int16, beside bfloat16 weights alone) is what they are short of
    (``master.py``), or None. Masks are packed (``bits.py``) or None.

    With ``runs`` the moments, their scales and the masks are flat, and of the elements in the runs alone.
    """

    param: Tensor
    grad: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    importance: Tensor | None
    isolation_mask: Tensor | None
    persistent_mask: Tensor | None
    layer: int = 0  # row of this parameter in the layer tables; -1 where a stage does not need one
    step: Tensor | None = None  # fp32 scalar, steps taken; it and the next three: step only
    hyper: HyperParameters | None = None
    maximize: bool = False
    rng_id: int = 0  # what sets this parameter's random numbers apart
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None
    importance_scale: Tensor | None = None
    weight_correction: Tensor | None = None
    index_offset: int = 0  # logical position of element 0 in the whole (unsharded) tensor
    index_run: int = 0  # element i is at index_offset + i // run * stride + i % run; 0: at index_offset + i
    index_stride: int = 0
    lr: Tensor | None = None  # [] or [1] fp32 on the device: read anew at every step, in place of hyper.lr
    # [r, 2] int64: first element and number of those that have state (runs.py); None: all have
    runs: np.ndarray | None = None

    @property
    def n_stored(self) -> int:
        """Elements that have state."""
        return self.param.numel() - self.n_stateless

    @property
    def n_stateless(self) -> int:
        """Elements without state: isolated for good."""
        return 0 if self.runs is None else self.param.numel() - int(self.runs[:, 1].sum())

    @property
    def has_nibbles(self) -> bool:
        """Whether ``exp_avg`` and ``exp_avg_sq`` are packed 4-bit codes."""
        return self.exp_avg_scale is not None and self.exp_avg_scale.dtype == nibbles.SCALE_DTYPE

    @property
    def u(self) -> Tensor:
        """The importance: the shared second moment, or the parameter's own tensor."""
        return self.exp_avg_sq if self.importance is None else self.importance

    @property
    def u_scale(self) -> Tensor | None:
        return self.exp_avg_sq_scale if self.importance is None else self.importance_scale

    def read_u(self, start: int, stop: int) -> Tensor:
        """Elements start .. stop - 1 of u as float32, row-major; ``start`` is a multiple of 64."""
        scale = self.u_scale
        blocks = slice(start // codec.BLOCK, -(-stop // codec.BLOCK))
        if scale is not None and self.has_nibbles:
            packed = self.u[start // 2 : nibbles.packed_bytes(stop)]
            return nibbles.decode_exp_avg_sq(nibbles.unpack(packed, stop - start), scale[blocks])
        u = self.u.reshape(-1)[start:stop]
        if scale is None:
            return u.to(torch.float32)
        return codec.decode(u, scale[blocks], signed=False)
