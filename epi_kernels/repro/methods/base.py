"""A method under way. The loop in `train` calls it; a method overrides what it does differently.

for each step:  zero_grad -> backward(micro-batch) ... -> gather -> clip -> step
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from epi_kernels.repro.stage import Batch, Stage

from .selection import parameters


def token_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens, in nats; 0-d float32, with a graph."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten(), ignore_index=-100
    )


class Running:
    """Full fine-tuning with torch.optim.AdamW, unless a subclass says otherwise.

    A subclass makes its optimizer in ``make_optimizer`` and may override the rest. ``state_dict`` must hold all that a
    stopped run needs beside weights, optimizer and random states.
    """

    replay = 0.0  # share of every batch that comes from the tasks of earlier stages

    def __init__(self, config: Any, stage: Stage) -> None:
        self.config, self.stage = config, stage
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> torch.optim.Optimizer:
        raise NotImplementedError

    def backward(self, batch: Batch, weight: float) -> float:
        """Adds `weight` times the gradient of the loss; returns the loss. A step's weights add up to 1 over all ranks."""
        loss = token_loss(self.stage.model, batch)
        (loss * weight).backward()
        return float(loss.detach())

    def idle(self, batch: Batch) -> None:
        """Passes that add zero, when other ranks' passes ask for this one's weights."""
        logits = self.stage.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        (0.0 * logits[:, 0].float().sum()).backward()

    def gather(self) -> None:
        """After a step's last micro-batch: gradients become the sums over the ranks, and penalties are added."""
        if not self.stage.sharded:  # FSDP2 has done it
            self.stage.ranks.add_gradients(parameters(self.optimizer))

    def step(self, step: int) -> None:
        """The update; `step` counts from 0."""
        self.optimizer.step()

    def finish(self) -> Any:
        """The model to keep: LoRA merges its adapters here."""
        return self.stage.model

    def extra_bytes(self) -> dict[str, int]:
        """State beside the optimizer's own (EWC's anchor, a window of gradients), by kind."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state
