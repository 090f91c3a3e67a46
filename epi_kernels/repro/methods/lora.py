"""LoRA (arXiv 2106.09685) by peft."""

from __future__ import annotations

from typing import Any

import torch

from epi_kernels.repro.errors import ReproError

from . import config as configs
from .base import Running
from .optimizers import adamw
from .selection import parameters


class Lora(Running):
    """Adapters on every linear layer but the output layer (peft's "all-linear", as QLoRA has it); nothing else trains.

    `stage.model` becomes peft's model while the stage goes on: its weights are saved and loaded under peft's names.
    """

    config: configs.Lora

    def make_optimizer(self) -> torch.optim.Optimizer:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise ReproError("lora: needs peft: pip install 'epi-kernels[integrations]'") from None
        config, stage = self.config, self.stage
        options = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  # only ever divided by r
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        # the first factors are random: by the stage's seed, whatever was drawn before
        devices = [stage.device] if stage.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(stage.seed)
            stage.model = get_peft_model(stage.model, options)
        return adamw(stage)

    def finish(self) -> Any:
        merged = self.stage.model.merge_and_unload()
        self.stage.model = merged.requires_grad_(True)
        return merged

    def extra_bytes(self) -> dict[str, int]:
        return {"adapters": sum(param.nbytes for param in parameters(self.optimizer))}  # also once merged
