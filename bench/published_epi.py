"""EPI as its paper describes it (arXiv 2604.14010), written plainly: what the method costs without fused kernels.

AdamW, a float32 exponential moving average of the squared gradient for every parameter, a bool mask, and a refresh
that normalises by minimum and maximum within each tensor and takes the largest scores of all. Not bit-exact with
anything; for benchmarks only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class PublishedEPI(torch.optim.Optimizer):
    """13 bytes of float32 and bool state a parameter; temporaries of the size of a parameter in every step.

    Args:
        params: tensors, float32 or bfloat16.
        ratio: share of all elements to isolate at a refresh.
        importance_beta: decay of the moving average.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        ratio: float = 0.01,
        importance_beta: float = 0.99,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.ratio, self.importance_beta = ratio, importance_beta

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step(param, group)

    def _step(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = 0
            for key in ("exp_avg", "exp_avg_sq", "importance"):
                state[key] = torch.zeros_like(param, dtype=torch.float32)
            state["isolation_mask"] = torch.zeros_like(param, dtype=torch.bool)
        state["step"] += 1
        assert param.grad is not None
        (beta1, beta2), grad = group["betas"], param.grad.float()
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        state["importance"].mul_(self.importance_beta).addcmul_(grad, grad, value=1 - self.importance_beta)
        denom = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        delta = (state["exp_avg"] / (1 - beta1 ** state["step"])).div_(denom)
        delta.add_(param, alpha=group["weight_decay"]).mul_(-group["lr"])
        param.add_(delta.masked_fill_(state["isolation_mask"], 0.0))

    @torch.no_grad()
    def refresh(self) -> None:
        """Isolates the ``ratio`` largest normalised importances."""
        scores = []
        for state in self.state.values():
            low, high = state["importance"].aminmax()
            scores.append(((state["importance"] - low) / (high - low)).flatten())
        everything = torch.cat(scores)
        threshold = everything.topk(int(self.ratio * everything.numel()), sorted=False).values.min()
        for state, score in zip(self.state.values(), scores):
            state["isolation_mask"].copy_(score.view_as(state["isolation_mask"]) >= threshold)
