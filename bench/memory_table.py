"""Bytes a parameter that each optimizer owns: counted from real optimizers, here and now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from epi_kernels import published
from epi_kernels.markdown import table

KINDS = (*published.STATE_BYTES, "weight_correction")
TITLES = ("exp_avg", "exp_avg_sq", "importance", "mask", "correction")
_N = 4096  # the fewest elements that may have states that are codes


@dataclass(frozen=True)
class Line:
    name: str
    sizes: dict[str, float]  # of KINDS, bytes a parameter
    refresh: str  # what a refresh adds

    @property
    def total(self) -> float:
        return sum(self.sizes.values())


def lines() -> list[Line]:
    """torch's AdamW, EPI as published and our configurations, after one step."""
    import torch

    from epi_kernels import MaskedEMAAdamW

    f32, bf16 = torch.float32, torch.bfloat16
    own, int8 = {"importance_beta": 0.99}, {"state_dtype": "int8"}
    ours: list[tuple[str, torch.dtype, dict[str, Any]]] = [
        ("ours, default, float32 weights", f32, {}),
        ("ours, default, bfloat16 weights", bf16, {}),
        ("ours, bfloat16 weights, float32 states", bf16, {"state_dtype": f32}),
        ("ours, float32 weights, bfloat16 states", f32, {"state_dtype": bf16}),
        ("ours, float32 weights, float32 importance of its own", f32, own),
        ("ours, bfloat16 weights, bfloat16 importance of its own", bf16, own | {"importance_dtype": bf16}),
        ("ours, 8-bit states, bfloat16 weights", bf16, int8),
        (
            "ours, 8-bit states, 8-bit importance of its own, bfloat16 weights",
            bf16,
            int8 | own | {"importance_dtype": "int8"},
        ),
        ("ours, 8-bit states, 24-bit weights", bf16, int8 | {"master_weight_bits": 24}),
        ("ours, 4-bit states, bfloat16 weights", bf16, {"state_dtype": "int4"}),
        ("ours, bfloat16 states, 32-bit weights", bf16, {"master_weight_bits": 32}),
    ]

    found = [
        Line(name, _measured(lambda params: torch.optim.AdamW(params, fused=True), dtype), "-")
        for name, dtype in (("torch AdamW, float32 weights", f32), ("torch AdamW, bfloat16 weights", bf16))
    ]
    epi = {kind: float(published.STATE_BYTES.get(kind, 0)) for kind in KINDS}
    name = "EPI as published (float32 EMA, bool mask, sort)"
    found.append(Line(name, epi, f"{published.REFRESH_BYTES} or more"))
    for name, dtype, options in ours:
        found.append(
            Line(
                name, _measured(lambda params, options=options: MaskedEMAAdamW(params, **options), dtype), "0"
            )
        )
    return found


def _measured(make: Callable[[list], Any], dtype: Any) -> dict[str, float]:
    import torch

    from epi_kernels.training import state_bytes

    param = torch.nn.Parameter(torch.ones(_N, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = make([param])
    optimizer.step()
    found = state_bytes(optimizer)
    return {kind: found.get(kind, 0) / _N for kind in KINDS}


def persistent_adds(isolation_ratio: float) -> float:
    """Bytes a parameter that a persistent mask adds where it is set."""
    import torch

    from epi_kernels import MaskedEMAAdamW

    def total(persistent: bool) -> int:
        param = torch.nn.Parameter(torch.ones(_N))
        optimizer = MaskedEMAAdamW([param], isolation_ratio=isolation_ratio)
        if persistent:
            optimizer.set_isolation_mask(param, torch.arange(_N) == 0, persistent=True)
        param.grad = torch.ones_like(param)
        optimizer.step()
        return optimizer.state_bytes()["total"]

    return (total(True) - total(False)) / _N


def _bytes(n: float) -> str:
    return f"{n:.3f}".rstrip("0").rstrip(".") if n else "0"


def text() -> str:
    """The README's block."""
    header = ["bytes a parameter", *TITLES, "state", "a refresh adds"]
    cells = [
        [line.name, *(_bytes(line.sizes[kind]) for kind in KINDS), f"**{_bytes(line.total)}**", line.refresh]
        for line in lines()
    ]
    return table(header, cells, "lrrrrrrr") + (
        f"\n\nA persistent mask adds {_bytes(persistent_adds(0.01))} where one is set; with ratio 0, where there is no other "
        f"mask, {_bytes(persistent_adds(0.0))}: itself, and the mask that the step reads."
    )
