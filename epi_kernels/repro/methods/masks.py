"""Masks to compare EPI's with: fixed before the stage, random, and turned round. Isolated weights keep their bits."""

from __future__ import annotations

import math

import torch

from epi_kernels.finetune.train import step_seed
from epi_kernels.isolation import IsolationError, find_core, freeze
from epi_kernels.optim import MaskedEMAAdamW
from epi_kernels.optim.report import IsolationReport
from epi_kernels.repro.errors import ReproError

from . import config as configs
from .base import Running
from .carried import carried_importance, carry_over
from .optimizers import masked_adamw
from .selection import install, lowest, parameters, random_masks, top_share


class Static(Running):
    """ "g2": what EPI would isolate by the carried importance. "delta": CPI-FT's core, the floor(p D) largest
    |theta - theta_0| of the stage before, over all tensors of the checkpoints."""

    config: configs.Static

    def make_optimizer(self) -> MaskedEMAAdamW:
        config, stage = self.config, self.stage
        optimizer = masked_adamw(stage)
        if config.carry:
            carry_over(optimizer, stage, "static")
        if config.by == "g2":
            importance = carried_importance(stage, "static by g2")
            masks = top_share(importance, config.ratio, normalization=config.normalization)
            install(optimizer, masks, persistent=True)
            return optimizer
        if stage.before is None or stage.origin is None:
            raise ReproError(
                "static by delta: needs a stage before this one, and the weights that it began with"
            )
        try:
            freeze(optimizer, [find_core(stage.origin, stage.before, config.ratio)])
        except IsolationError as error:
            raise ReproError(f"static by delta: {error}") from None
        return optimizer


class RandomMask(Running):
    """Exactly floor(p N) of all N elements, drawn from the seed and the step."""

    config: configs.RandomMask
    optimizer: MaskedEMAAdamW

    def make_optimizer(self) -> MaskedEMAAdamW:
        optimizer = masked_adamw(self.stage)
        if self.config.carry:
            carry_over(optimizer, self.stage, "random")
        self._draw(optimizer, 0)
        return optimizer

    def step(self, step: int) -> None:
        self.optimizer.step()
        if (step + 1) % self.config.interval == 0:
            self._draw(self.optimizer, step + 1)

    def _draw(self, optimizer: MaskedEMAAdamW, step: int) -> None:
        params = parameters(optimizer)
        count = math.floor(self.config.ratio * sum(param.numel() for param in params))
        for param, mask in zip(
            params, random_masks(params, count, step_seed(self.stage.seed, step)), strict=True
        ):
            optimizer.set_isolation_mask(param, mask)


class Inverted(Running):
    """EPI, whose every mask is replaced by one of as many elements with the lowest scores.

    The optimizer's report is of EPI's selection: its overlaps compare that with the inverted mask before.
    """

    config: configs.Inverted
    optimizer: MaskedEMAAdamW
    _turned: IsolationReport | None = None

    def make_optimizer(self) -> MaskedEMAAdamW:
        config = self.config
        # Not of 8 bits: the scores below are read from the state as it is.
        optimizer = masked_adamw(
            self.stage, isolation_ratio=config.ratio, mask_interval=config.interval, state_dtype=None
        )
        if config.carry:
            carry_over(optimizer, self.stage, "inverted")
            optimizer.refresh_isolation_mask()
            self._turn(optimizer)
        return optimizer

    def step(self, step: int) -> None:
        self.optimizer.step()
        self._turn(self.optimizer)

    @torch.no_grad()
    def _turn(self, optimizer: MaskedEMAAdamW) -> None:
        """Where the optimizer has just refreshed."""
        report = optimizer.isolation_report()
        if report is None or report is self._turned:
            return
        self._turned, params = report, parameters(optimizer)
        states = (optimizer.state.get(param, {}) for param in params)
        importance = [s.get("exp_avg_sq", torch.zeros_like(p)) for p, s in zip(params, states, strict=True)]
        seed = step_seed(self.stage.seed, report.step)
        for param, mask in zip(params, lowest(importance, report.isolated, seed), strict=True):
            optimizer.set_isolation_mask(param, mask)
