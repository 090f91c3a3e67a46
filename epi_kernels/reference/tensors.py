"""The tensors of one parameter as every stage and backend receives them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from epi_kernels.reference.scalars import StepScalars


@dataclass(slots=True)
class ParamTensors:
    """One parameter, its gradient and its state. States are contiguous; param and grad need not be.

    Dtypes: ``grad`` has the parameter's; ``exp_avg`` and ``exp_avg_sq`` share one of float32, bfloat16
    (float64 on the reference backend); ``importance`` is None when shared with ``exp_avg_sq``, else
    float32 or bfloat16. Masks are packed (``bits.py``) or None.
    """

    param: Tensor
    grad: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    importance: Tensor | None
    isolation_mask: Tensor | None
    persistent_mask: Tensor | None
    layer: int = 0  # row of this parameter in the layer tables; -1 where a stage does not need one
    scalars: StepScalars | None = None  # step only
    maximize: bool = False  # step only
    rng_key: int = 0  # step only: rounding.stream_key(seed, t, id)
    index_offset: int = 0  # logical position of element 0 in the whole (unsharded) tensor

    @property
    def u(self) -> Tensor:
        """The importance: the shared second moment, or the parameter's own tensor."""
        return self.exp_avg_sq if self.importance is None else self.importance
