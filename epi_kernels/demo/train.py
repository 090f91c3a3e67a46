"""The model, one stage of training, and the score."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer

from epi_kernels.demo.tasks import ALPHABET, IGNORED, LENGTH, Examples


def make_model(seed: int, hidden: int, layers: int) -> Any:
    """A Llama from a config, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH + 1,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def schedule(step: int, steps: int, warmup: float = 0.03, floor: float = 0.1) -> float:
    """Factor on the learning rate of step 0 .. steps-1: linear warm-up, then a cosine down to `floor`."""
    warm = max(1, round(steps * warmup))
    if step < warm:
        return (step + 1) / warm
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(
    model: Any,
    optimizer: Optimizer,
    examples: Examples,
    steps: int,
    batch: int,
    seed: int,
    after_step: Callable[[int], None],
) -> None:
    """`steps` steps on shuffled batches, gradients clipped to norm 1. `after_step` gets the number of steps done."""
    rng = torch.Generator().manual_seed(seed)
    base = [group["lr"] for group in optimizer.param_groups]
    parameters = list(model.parameters())
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(examples), generator=rng)
        rows, order = order[:batch], order[batch:]
        for group, lr in zip(optimizer.param_groups, base):
            group["lr"] = lr * schedule(step, steps)
        logits = model(input_ids=examples.ids[rows]).logits  # [batch, LENGTH, alphabet]
        loss = F.cross_entropy(logits.flatten(0, 1), examples.labels[rows].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        after_step(step + 1)


@torch.no_grad()
def score(model: Any, examples: Examples) -> float:
    """Percent of prompts whose every answer character is the likeliest one, given the right characters before it.

    That is greedy decoding's exact match: the two part only after a first mistake, when both have failed.
    """
    guess = model(input_ids=examples.ids).logits.argmax(-1)  # [n, LENGTH]
    right = (guess == examples.labels) | (examples.labels == IGNORED)
    return 100.0 * right.all(1).double().mean().item()
