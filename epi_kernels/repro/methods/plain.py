"""AdamW in plain torch operations, for methods that hold some entries back. Needs torch alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class PlainAdamW(torch.optim.Optimizer):
    """float32 moments; temporaries of the size of a parameter in every step. ``held`` says which entries keep still,
    weight decay included.

    Args:
        params: tensors, (name, tensor) pairs or groups, float32 or bfloat16.
    """

    moments = ("exp_avg", "exp_avg_sq")  # float32 zeros at first

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def held(self, state: dict[str, Any], grad: Tensor) -> Tensor:
        """bool, of the parameter's shape; the step's moments are in `state`."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step(param, group)

    def state_of(self, param: Tensor) -> dict[str, Any]:
        """The parameter's state, made where there is none."""
        state = self.state[param]
        if not state:
            state["step"] = 0
            for key in self.moments:
                state[key] = torch.zeros_like(param, dtype=torch.float32)
        return state

    def _step(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state_of(param)
        state["step"] += 1
        assert param.grad is not None
        (beta1, beta2), grad = group["betas"], param.grad.float()
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        held = self.held(state, grad)
        denom = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        delta = (state["exp_avg"] / (1 - beta1 ** state["step"])).div_(denom)
        delta.add_(param, alpha=group["weight_decay"]).mul_(-group["lr"])
        param.add_(delta.masked_fill_(held, 0.0))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch, but states keep their dtypes; torch gives them the weight's, bool masks too."""
        super().load_state_dict(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        saved_order = [index for group in state_dict["param_groups"] for index in group["params"]]
        for param, index in zip(params, saved_order, strict=True):
            if index in state_dict["state"]:
                self.state[param] = {
                    key: value.to(param.device, copy=True) if isinstance(value, Tensor) else value
                    for key, value in state_dict["state"][index].items()
                }
