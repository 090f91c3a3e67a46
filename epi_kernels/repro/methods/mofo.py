"""MoFO (arXiv 2407.20999): only the entries with the largest momentum of each tensor are updated.

The paper keeps all other entries fixed, and so does this. The authors' code (github.com/YChen-zzz/MoFO) differs in
two ways that are not taken over: weight decay moves every entry there, and biases and norms are not filtered.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import config as configs
from .base import Running
from .optimizers import parameter_groups
from .plain import PlainAdamW


class MoFO(PlainAdamW):
    """AdamW at the entries whose \\|exp_avg\\|, this step's gradient included, is among the floor(fraction * n) largest of
    its tensor, one at least; ties at the bound are all updated. Moments of all entries advance."""

    def __init__(self, params: Iterable[Any], *, fraction: float, **options: Any) -> None:
        super().__init__(params, **options)
        self.fraction = fraction

    def held(self, state: dict[str, Any], grad: Tensor) -> Tensor:
        size = state["exp_avg"].abs()
        count = max(1, int(self.fraction * size.numel()))
        return size < size.flatten().topk(count, sorted=False).values.min()


class Mofo(Running):
    config: configs.Mofo

    def make_optimizer(self) -> torch.optim.Optimizer:
        recipe = self.stage.recipe
        return MoFO(
            parameter_groups(self.stage), lr=recipe.lr, betas=recipe.betas, fraction=self.config.fraction
        )
