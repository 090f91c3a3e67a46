"""Quadratic pulls to the weights of the stage before.

The penalty is 0.5 * strength * sum F (theta - theta*)^2 (EWC: arXiv 1612.00796, equation 3; L2-SP: arXiv 1802.01483,
F = 1, and no layer without a counterpart). Its gradient, strength * F * (theta - theta*), is added once a step
to the loss's before clipping, as it would come out of backward without its graph; AdamW then scales the sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.stage import Stage

from . import config as configs
from .base import Running
from .carried import carried_importance
from .optimizers import adamw
from .selection import named


class _Pull(Running):
    def __init__(self, config: Any, stage: Stage) -> None:
        self._fisher = self._weights(stage)
        super().__init__(config, stage)
        self._params = named(self.optimizer)
        self._anchor = {name: param.detach().clone() for name, param in self._params.items()}

    def _weights(self, stage: Stage) -> dict[str, Tensor] | None:
        """F by name; None is 1 everywhere."""
        return None

    def make_optimizer(self) -> torch.optim.Optimizer:
        return adamw(self.stage)

    @torch.no_grad()
    def gather(self) -> None:
        super().gather()
        for name, param in self._params.items():
            if param.grad is None:
                continue  # no gradient, no step: it has not moved
            pull = param.float() - self._anchor[name].float()
            if self._fisher is not None:
                pull *= self._fisher[name]
            param.grad.add_(pull, alpha=self.config.strength)

    def extra_bytes(self) -> dict[str, int]:
        held = {"anchor": sum(one.nbytes for one in self._anchor.values())}
        if self._fisher is not None:
            held["fisher"] = sum(one.nbytes for one in self._fisher.values())
        return held

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": self._anchor}  # the Fisher is read anew from the run before

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, anchor in self._anchor.items():
            anchor.copy_(state["anchor"][name])


class L2Sp(_Pull):
    config: configs.L2Sp


class Ewc(_Pull):
    """F is the carried mean squared batch gradient, de-biased and divided by its mean over all weights, so that one
    strength means the same for every model, and the same as L2-SP's on average."""

    config: configs.Ewc

    def _weights(self, stage: Stage) -> dict[str, Tensor]:
        fisher = carried_importance(stage, "ewc", mean=True)
        total = sum(one.sum(dtype=torch.float64).item() for one in fisher.values())
        mean = total / sum(one.numel() for one in fisher.values())
        if not 0 < mean < float("inf"):
            raise ReproError(
                f"ewc: the importance of the run in {stage.before} has mean {mean}: it weighs nothing"
            )
        for one in fisher.values():
            one /= mean
        return fisher
