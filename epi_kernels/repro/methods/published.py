"""EPI as its paper describes it (arXiv 2604.14010), written plainly: what the method costs without fused kernels.

AdamW, a float32 exponential moving average of the squared gradient for every parameter, a bool mask, and a refresh
that normalises by minimum and maximum within each tensor and takes the largest scores of all. Not bit-exact with
anything. Needs torch alone: bench/ steps it too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .plain import PlainAdamW


class PublishedEPI(PlainAdamW):
    """13 bytes of float32 and bool state a parameter; temporaries of the size of a parameter in every step.

    Args:
        params: tensors, (name, tensor) pairs or groups, float32 or bfloat16.
        ratio: share of all elements to isolate at a refresh.
        importance_beta: decay of the moving average.
        options: of ``PlainAdamW``.
    """

    moments = ("exp_avg", "exp_avg_sq", "importance")

    def __init__(
        self, params: Iterable[Any], *, ratio: float = 0.01, importance_beta: float = 0.99, **options: Any
    ) -> None:
        super().__init__(params, **options)
        self.ratio, self.importance_beta = ratio, importance_beta

    def state_of(self, param: Tensor) -> dict[str, Any]:
        state = super().state_of(param)
        if "isolation_mask" not in state:
            state["isolation_mask"] = torch.zeros_like(param, dtype=torch.bool)
        return state

    def held(self, state: dict[str, Any], grad: Tensor) -> Tensor:
        state["importance"].mul_(self.importance_beta).addcmul_(grad, grad, value=1 - self.importance_beta)
        return state["isolation_mask"]

    def isolation_mask(self, param: Tensor) -> Tensor:
        """bool, of the parameter's shape; all False before its first step."""
        mask = self.state[param].get("isolation_mask") if param in self.state else None
        return torch.zeros_like(param, dtype=torch.bool) if mask is None else mask

    @torch.no_grad()
    def start_importance(self, param: Tensor, importance: Tensor) -> None:
        """Carries a moving average over from an earlier stage; `refresh` then isolates by it."""
        self.state_of(param)["importance"].copy_(importance)

    @torch.no_grad()
    def refresh(self) -> None:
        """Isolates the ``ratio`` largest normalised importances."""
        scores = []
        for state in self.state.values():
            low, high = state["importance"].aminmax()
            spread = torch.where(high > low, high - low, 1.0)  # a tensor of equal importances scores 0
            scores.append(((state["importance"] - low) / spread).flatten())
        everything = torch.cat(scores)
        count = int(self.ratio * everything.numel())
        threshold = everything.topk(count, sorted=False).values.min() if count else torch.inf
        for state, score in zip(self.state.values(), scores):
            state["isolation_mask"].copy_(score.view_as(state["isolation_mask"]) >= threshold)
