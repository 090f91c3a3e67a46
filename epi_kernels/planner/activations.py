"""Peak of a training step's forward and backward pass, from the model's config alone: nothing is allocated.

The model runs once on fake tensors, which have shapes and no memory, under torch's own ``MemTracker``.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch


def peak_bytes(
    config: Any,  # a transformers config
    *,
    batch: int,
    length: int,
    dtype: torch.dtype,
    checkpointing: bool,
    release: bool,
) -> int:
    """What both passes hold at most, weights and gradients included, over ``batch`` sequences of ``length`` tokens, with attention that keeps no matrix of scores (sdpa).

    ``release``: every gradient is freed as soon as it is there (``enable_gradient_release``).

    Raises:
        UserError: the config makes no causal language model, or one that cannot run on fake tensors.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from transformers import AutoModelForCausalLM

    from epi_kernels.finetune.errors import UserError

    config = copy.deepcopy(config)  # from_config writes into it
    config.use_cache = False
    try:
        with warnings.catch_warnings(), FakeTensorMode():
            warnings.simplefilter("ignore")  # the tracker's, of outputs that are no tensors
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            if release:
                for param in model.parameters():
                    param.register_post_accumulate_grad_hook(_free)
            tokens = torch.zeros(batch, length, dtype=torch.long)
            tracker = MemTracker()
            tracker.track_external(model)
            with tracker:
                model(input_ids=tokens, labels=tokens).loss.backward()
            snapshots = tracker.get_tracker_snapshot("peak")
    except Exception as error:  # of whatever the model's own code stumbles over
        raise UserError(
            f"the pass of a {type(config).__name__.removesuffix('Config')} cannot be counted "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from None
    return sum(snapshot["Total"] for snapshot in snapshots.values())


def _free(param: torch.Tensor) -> None:
    param.grad = None
