"""Experience replay: the loop draws a share of every batch from the tasks of the stages before."""

from __future__ import annotations

import torch

from epi_kernels.repro.stage import Stage

from . import config as configs
from .base import Running
from .optimizers import adamw


class Replay(Running):
    config: configs.Replay

    def __init__(self, config: configs.Replay, stage: Stage) -> None:
        super().__init__(config, stage)
        self.replay = config.share

    def make_optimizer(self) -> torch.optim.Optimizer:
        return adamw(self.stage)
