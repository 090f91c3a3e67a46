"""From options to an optimizer and a schedule; the environment that decides their last bits."""

from __future__ import annotations

import platform

import torch

import epi_kernels
from epi_kernels.integrations import transformer_block

from . import model
from .errors import UserError
from .job import Job
from .options import Options


def environment(job: Job) -> dict[str, object]:
    """What decides the last bits of a result, beside the arguments."""
    import transformers

    device = job.device
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {
        "epi_kernels": epi_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": name,
        "ranks": job.ranks.size,
        "fsdp": job.sharded,
    }


def build_optimizer(options: Options, groups: list[dict], label: str) -> torch.optim.Optimizer:
    """`label`: "isolation" for MaskedEMAAdamW with the options, "adamw" for torch.optim.AdamW."""
    betas = (options.beta1, options.beta2)
    if label == "adamw":
        return torch.optim.AdamW(
            groups, lr=options.lr, betas=betas, eps=options.eps, weight_decay=options.weight_decay
        )
    named = model.STATE_DTYPES
    try:
        return epi_kernels.MaskedEMAAdamW(
            groups, lr=options.lr, betas=betas, eps=options.eps, weight_decay=options.weight_decay,
            isolation_ratio=_ratio(options), mask_interval=_interval(options), mask_warmup=options.mask_warmup,
            importance_beta=options.importance_beta, importance_dtype=named[options.importance_dtype],
            normalization=options.normalization, scope=options.scope,
            layer_key=transformer_block if options.layer_key == "block" else None, hysteresis=options.hysteresis,
            state_dtype=named[options.state_dtype] if options.state_dtype else None,
            master_weight_bits=options.master_weight_bits,
            stochastic_rounding=options.stochastic_rounding, seed=options.seed, backend=options.backend,
            offload=options.offload,
        )  # fmt: skip
    except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
        raise UserError(f"the optimizer refuses: {error}") from None


def _ratio(options: Options) -> float | epi_kernels.AdaptiveRatio:
    if options.adaptive_ratio is None:
        return options.isolation_ratio
    minimum, maximum = options.adaptive_ratio
    return epi_kernels.AdaptiveRatio(options.isolation_ratio, minimum, maximum)


def _interval(options: Options) -> int | epi_kernels.AdaptiveInterval:
    if options.adaptive_interval is None:
        return options.mask_interval
    minimum, maximum = options.adaptive_interval
    return epi_kernels.AdaptiveInterval(options.mask_interval, minimum, maximum)


def check_optimizer(options: Options, dtype: torch.dtype, device: str) -> None:
    """Refuses, before any weights are loaded, what the optimizer refuses: an argument, or a backend that cannot run."""
    stand_in = torch.nn.Parameter(torch.empty(1, 1, dtype=dtype, device=device))
    build_optimizer(options, [{"params": [("stand_in", stand_in)]}], "isolation")


def build_scheduler(options: Options, optimizer, steps: int):
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    warmup = round(options.warmup_ratio * steps)
    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, warmup, steps, min_lr_rate=options.min_lr_ratio
    )
