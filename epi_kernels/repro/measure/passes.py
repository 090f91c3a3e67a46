"""Forward and backward passes beside a training run, which leave no trace in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from epi_kernels.repro.methods.base import token_loss
from epi_kernels.repro.stage import Batch, Stage, seed_random


def trainable(stage: Stage) -> dict[str, Tensor]:
    """The parameters that are trained, by name; tied ones once."""
    return {name: param for name, param in stage.model.named_parameters() if param.requires_grad}


@contextlib.contextmanager
def undisturbed(stage: Stage, seed: int) -> Iterator[None]:
    """Random states start from ``seed`` inside; they and the modules' training flags are as before after it."""
    on_gpu = stage.device.type == "cuda"
    index = torch.cuda.current_device() if on_gpu and stage.device.index is None else stage.device.index
    flags = [(module, module.training) for module in stage.model.modules()]
    with torch.random.fork_rng(devices=[index] if on_gpu else []):
        seed_random(stage.device, seed)  # torch.manual_seed would change those of other devices too
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag


def gradients(stage: Stage, batch: Batch, seed: int = 0) -> list[Tensor]:
    """Of the batch's mean loss over its answer tokens, as a step has it, in the order of `trainable` and its dtypes; zeros where a parameter has no part in it.

    In the model's own mode (dropout as in training, drawn from ``seed``), by as many micro-batches as a step has, and
    without penalties that a method adds. Not clipped. `.grad` is neither read nor written, and hooks that wait for it
    do not run.
    """
    params = list(trainable(stage).values())
    rows, learned = len(batch.input_ids), batch.answer_tokens().tolist()
    micro = -(-rows // stage.recipe.accumulation)
    total: list[Tensor] | None = None
    with undisturbed(stage, seed), torch.enable_grad():
        for begin in range(0, rows, micro):
            tokens = sum(learned[begin : begin + micro])
            if not tokens:
                continue  # the mean of none is not a number
            part = batch.rows(slice(begin, begin + micro))
            loss = token_loss(stage.model, part) * (tokens / sum(learned))
            found = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
            # not in place: two parameters may have been given one tensor
            total = list(found) if total is None else [one + more for one, more in zip(total, found)]
    return [torch.zeros_like(param) for param in params] if total is None else total


def clip_factor(stage: Stage, grads: Iterable[Tensor]) -> Tensor | float:
    """What clipping multiplies such a gradient by, as `torch.nn.utils.clip_grad_norm_` does."""
    if stage.recipe.clip is None:
        return 1.0
    norm = torch.nn.utils.get_total_norm(grads)
    return torch.clamp(stage.recipe.clip / (norm + 1e-6), max=1.0)


def held_out_loss(stage: Stage, batch: Batch) -> float:
    """Nats a token, without dropout."""
    rows = len(batch.input_ids)
    micro = max(1, stage.recipe.batch // stage.recipe.accumulation)
    total, tokens = 0.0, 0
    learned = batch.answer_tokens().tolist()
    with undisturbed(stage, 0), torch.no_grad():
        stage.model.eval()
        for begin in range(0, rows, micro):
            count = sum(learned[begin : begin + micro])
            if count:
                part = batch.rows(slice(begin, begin + micro))
                total += float(token_loss(stage.model, part)) * count
                tokens += count
    return total / tokens
