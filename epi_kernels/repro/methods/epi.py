"""EPI by the fused optimizer, with all its options, and EPI as published."""

from __future__ import annotations

from typing import Any

import torch

from epi_kernels.integrations.groups import transformer_block
from epi_kernels.policies.schedule import AdaptiveInterval, AdaptiveRatio

from . import config as configs
from .base import Running
from .carried import carried_importance, carry_over
from .optimizers import STATE_DTYPES, masked_adamw, parameter_groups
from .published import PublishedEPI
from .selection import install, named, top_share


class Epi(Running):
    """With ``carry`` the mask isolates from the first step. ``core``: a persistent mask of the carried importance's top
    share, selected as the evolving mask is; that one is selected beside it and not less for it."""

    config: configs.Epi

    def make_optimizer(self) -> torch.optim.Optimizer:
        config, stage = self.config, self.stage
        selection: dict[str, Any] = {
            "normalization": config.normalization,
            "scope": config.scope,
            "layer_key": transformer_block if config.by_block else None,
        }
        optimizer = masked_adamw(
            stage,
            isolation_ratio=AdaptiveRatio(config.ratio) if config.adaptive else config.ratio,
            mask_interval=AdaptiveInterval(config.interval) if config.adaptive else config.interval,
            importance_beta=config.importance_beta,
            hysteresis=config.hysteresis,
            state_dtype=STATE_DTYPES[config.state_dtype or stage.recipe.state_dtype],
            **selection,
        )
        if config.carry:
            carry_over(optimizer, stage, "epi")
        if config.core:
            importance = carried_importance(stage, "epi with a core")
            install(optimizer, top_share(importance, config.core, **selection), persistent=True)
        if config.carry:
            optimizer.refresh_isolation_mask()
        return optimizer


class PublishedEpi(Running):
    config: configs.PublishedEpi
    optimizer: PublishedEPI

    def make_optimizer(self) -> PublishedEPI:
        config, stage = self.config, self.stage
        optimizer = PublishedEPI(
            parameter_groups(stage),
            lr=stage.recipe.lr,
            betas=stage.recipe.betas,
            ratio=config.ratio,
            importance_beta=config.importance_beta,
        )
        if config.carry:
            importance = carried_importance(stage, "published")
            for name, param in named(optimizer).items():
                optimizer.start_importance(param, importance[name])
            optimizer.refresh()
        return optimizer

    def step(self, step: int) -> None:
        self.optimizer.step()
        if (step + 1) % self.config.interval == 0:
            self.optimizer.refresh()
