"""Who steps beside whom in bench.side_by_side: our configurations, torch's optimizers, EPI as published, peers.

A peer that is not installed, or cannot run on the device, becomes a row that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bench.published_epi import PublishedEPI
from epi_kernels import MaskedEMAAdamW

LR = 1e-6  # small, so that a thousand rounds leave the weights where they are
Make = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Contender:
    name: str
    weights: torch.dtype  # of weights and gradients
    make: Make
    isolates: bool
    note: str  # what is unlike the others
    refresh: str | None = None  # the method that selects anew
    cpu_only: bool = False

    @property
    def slug(self) -> str:
        kept = "".join(c if c.isalnum() else "-" for c in self.name.lower())
        return "-".join(part for part in kept.split("-") if part)


F32, BF16 = torch.float32, torch.bfloat16
REFERENCE = {F32: "torch fused, float32", BF16: "torch fused, bfloat16"}


def _ours(**options: Any) -> Make:
    return lambda params: MaskedEMAAdamW(params, lr=LR, mask_interval=None, **options)


def _torch(**options: Any) -> Make:
    return lambda params: torch.optim.AdamW(params, lr=LR, **options)


def _published(params: Sequence[Tensor]) -> torch.optim.Optimizer:
    return PublishedEPI(params, lr=LR)


def _bitsandbytes(params: Sequence[Tensor]) -> torch.optim.Optimizer:
    import bitsandbytes  # pyright: ignore[reportMissingImports]

    return bitsandbytes.optim.AdamW8bit(params, lr=LR)


def _torchao(bits: int) -> Make:
    def make(params: Sequence[Tensor]) -> torch.optim.Optimizer:
        from torchao import optim  # pyright: ignore[reportMissingImports]

        kind = {8: optim.AdamW8bit, 4: optim.AdamW4bit}[bits]
        return kind(params, lr=LR, bf16_stochastic_round=True)

    return make


def _flashoptim(master_weight_bits: Literal[24] | None) -> Make:
    def make(params: Sequence[Tensor]) -> torch.optim.Optimizer:
        import flashoptim  # pyright: ignore[reportMissingImports]

        return flashoptim.FlashAdamW(params, lr=LR, master_weight_bits=master_weight_bits)

    return make


def _optimi(params: Sequence[Tensor]) -> torch.optim.Optimizer:
    import optimi  # pyright: ignore[reportMissingImports]

    return optimi.AdamW(params, lr=LR, kahan_sum=True)


def _deepspeed(params: Sequence[Tensor]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # pyright: ignore[reportMissingImports]

    return DeepSpeedCPUAdam(params, lr=LR)


REFRESH = "refresh_isolation_mask"
CONTENDERS = [
    Contender(REFERENCE[F32], F32, _torch(fused=True), False, "isolates nothing"),
    Contender(
        "torch foreach, float32", F32, _torch(foreach=True), False, "isolates nothing; an operation at a time"
    ),
    Contender("ours, float32", F32, _ours(), True, "importance is exp_avg_sq", REFRESH),
    Contender(
        "ours, float32, own importance",
        F32,
        _ours(importance_beta=0.99),
        True,
        "one more float32 EMA",
        REFRESH,
    ),
    Contender(
        "ours, float32, own 8-bit importance",
        F32,
        _ours(importance_beta=0.99, importance_dtype="int8"),
        True,
        "one more 8-bit EMA, rounded stochastically",
        REFRESH,
    ),
    Contender(
        "ours, float32, bfloat16 states",
        F32,
        _ours(state_dtype=BF16),
        True,
        "stochastic rounding of states",
        REFRESH,
    ),
    Contender(
        "ours, float32, 8-bit states",
        F32,
        _ours(state_dtype="int8"),
        True,
        "stochastic rounding of states",
        REFRESH,
    ),
    Contender(
        "ours, float32, 8-bit states and own importance",
        F32,
        _ours(state_dtype="int8", importance_beta=0.99, importance_dtype="int8"),
        True,
        "stochastic rounding of states; one more 8-bit EMA",
        REFRESH,
    ),
    Contender(
        "ours, float32, 4-bit states",
        F32,
        _ours(state_dtype="int4"),
        True,
        "stochastic rounding of states",
        REFRESH,
    ),
    Contender(
        "EPI as published, float32",
        F32,
        _published,
        True,
        "plain PyTorch: float32 EMA, bool mask, top-k over all scores",
        "refresh",
    ),
    Contender(
        "DeepSpeed CPUAdam, float32", F32, _deepspeed, False, "isolates nothing; CPU only", cpu_only=True
    ),
    Contender(REFERENCE[BF16], BF16, _torch(fused=True), False, "isolates nothing; states round to nearest"),
    Contender(
        "torch foreach, bfloat16",
        BF16,
        _torch(foreach=True),
        False,
        "isolates nothing; states round to nearest; an operation at a time",
    ),
    Contender("ours, bfloat16", BF16, _ours(), True, "stochastic rounding", REFRESH),
    Contender(
        "ours, bfloat16, float32 states",
        BF16,
        _ours(state_dtype=F32),
        True,
        "stochastic rounding of weights",
        REFRESH,
    ),
    Contender(
        "ours, bfloat16, own importance",
        BF16,
        _ours(importance_beta=0.99, importance_dtype=BF16),
        True,
        "stochastic rounding; one more bfloat16 EMA",
        REFRESH,
    ),
    Contender(
        "ours, bfloat16, own 8-bit importance",
        BF16,
        _ours(importance_beta=0.99, importance_dtype="int8"),
        True,
        "stochastic rounding; one more 8-bit EMA",
        REFRESH,
    ),
    Contender(
        "ours, bfloat16, 24-bit weights",
        BF16,
        _ours(master_weight_bits=24),
        True,
        "stochastic rounding; 8-bit weight correction",
        REFRESH,
    ),
    Contender(
        "ours, bfloat16, 32-bit weights",
        BF16,
        _ours(master_weight_bits=32),
        True,
        "stochastic rounding of states; 16-bit weight correction",
        REFRESH,
    ),
    Contender(
        "ours, bfloat16, 8-bit states", BF16, _ours(state_dtype="int8"), True, "stochastic rounding", REFRESH
    ),
    Contender(
        "ours, bfloat16, 4-bit states", BF16, _ours(state_dtype="int4"), True, "stochastic rounding", REFRESH
    ),
    Contender(
        "ours, bfloat16, 8-bit states, 24-bit weights",
        BF16,
        _ours(state_dtype="int8", master_weight_bits=24),
        True,
        "stochastic rounding; 8-bit weight correction",
        REFRESH,
    ),
    Contender(
        "ours, bfloat16, 8-bit states, 32-bit weights",
        BF16,
        _ours(state_dtype="int8", master_weight_bits=32),
        True,
        "stochastic rounding of states; 16-bit weight correction",
        REFRESH,
    ),
    Contender(
        "ours, bfloat16, 4-bit states, 24-bit weights",
        BF16,
        _ours(state_dtype="int4", master_weight_bits=24),
        True,
        "stochastic rounding; 8-bit weight correction",
        REFRESH,
    ),
    Contender(
        "ours, bfloat16, 8-bit states and own importance",
        BF16,
        _ours(state_dtype="int8", importance_beta=0.99, importance_dtype="int8"),
        True,
        "stochastic rounding; one more 8-bit EMA",
        REFRESH,
    ),
    Contender(
        "EPI as published, bfloat16",
        BF16,
        _published,
        True,
        "plain PyTorch: float32 states, bool mask; weights round to nearest",
        "refresh",
    ),
    Contender("bitsandbytes 8-bit", BF16, _bitsandbytes, False, "isolates nothing; weights round to nearest"),
    Contender("torchao 8-bit", BF16, _torchao(8), False, "isolates nothing; weights round stochastically"),
    Contender("torchao 4-bit", BF16, _torchao(4), False, "isolates nothing; weights round stochastically"),
    Contender("flashoptim", BF16, _flashoptim(None), False, "isolates nothing; weights round to nearest"),
    Contender(
        "flashoptim, 24-bit weights",
        BF16,
        _flashoptim(24),
        False,
        "isolates nothing; 8-bit weight correction",
    ),
    Contender("optimi with Kahan", BF16, _optimi, False, "isolates nothing; 16-bit weight correction"),
    Contender(
        "DeepSpeed CPUAdam, bfloat16", BF16, _deepspeed, False, "isolates nothing; CPU only", cpu_only=True
    ),
]
NOTES = {contender.name: contender.note for contender in CONTENDERS}
