"""Full fine-tuning: every weight moves."""

from __future__ import annotations

import torch

from . import config as configs
from .base import Running
from .carried import carry_over
from .optimizers import adamw, masked_adamw


class Full(Running):
    """``keep_moments``: second moments and step counts of the stage before go on, as they do in EPI with carry; first
    moments start at zero."""

    config: configs.Full

    def make_optimizer(self) -> torch.optim.Optimizer:
        if self.config.optimizer == "torch":
            return adamw(self.stage)
        optimizer = masked_adamw(self.stage)
        if self.config.keep_moments:
            carry_over(optimizer, self.stage, "full with keep_moments")
        return optimizer
