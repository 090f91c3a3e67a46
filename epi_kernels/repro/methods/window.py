"""EPI by the mean squared gradient over the last steps, in place of the moving average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epi_kernels.optim import MaskedEMAAdamW

from . import config as configs
from .base import Running
from .carried import carried_importance, carry_over
from .optimizers import masked_adamw
from .selection import install, named, top_share


class Window(Running):
    """A ring of squared gradients, as clipped, of the size of the weights times `window` in float32.

    With ``carry`` the carried importance isolates up to the first refresh; later ones know the window alone.
    """

    config: configs.Window
    optimizer: MaskedEMAAdamW

    def __init__(self, config: configs.Window, stage: Any) -> None:
        super().__init__(config, stage)
        self._ring = {
            name: torch.zeros((config.window, *param.shape), device=param.device)
            for name, param in named(self.optimizer).items()
        }

    def make_optimizer(self) -> MaskedEMAAdamW:
        optimizer = masked_adamw(self.stage)
        if self.config.carry:
            carry_over(optimizer, self.stage, "window")
            install(optimizer, top_share(carried_importance(self.stage, "window"), self.config.ratio))
        return optimizer

    @torch.no_grad()
    def step(self, step: int) -> None:
        for name, param in named(self.optimizer).items():
            slot = self._ring[name][step % self.config.window]
            slot.zero_() if param.grad is None else slot.copy_(param.grad).square_()
        self.optimizer.step()
        if (step + 1) % self.config.interval == 0:
            install(self.optimizer, top_share(self._mean(step + 1), self.config.ratio))

    def _mean(self, steps: int) -> dict[str, Tensor]:
        filled = min(steps, self.config.window)
        return {name: ring[:filled].mean(0) for name, ring in self._ring.items()}

    def extra_bytes(self) -> dict[str, int]:
        return {"window": sum(ring.nbytes for ring in self._ring.values())}

    def state_dict(self) -> dict[str, Any]:
        return {"ring": self._ring}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, ring in self._ring.items():
            ring.copy_(state["ring"][name])
