"""torchtitan: a config in the place of ``default_adamw``; checkpoints and schedules are torchtitan's own.

    from epi_kernels.integrations.torchtitan import masked_ema_adamw

    def my_llama3() -> Trainer.Config:
        config = llama3_8b()
        config.optimizer = masked_ema_adamw(lr=3e-4, isolation_ratio=0.01, mask_interval=100)
        return config

The hook: ``torchtitan.trainer.Trainer`` builds its optimizers with ``config.optimizer.build(model_parts=...)``,
and ``OptimizersContainer._resolve_optimizer_factory`` (torchtitan/components/optimizer/optimizer.py, 0.3.0) looks
a group's ``optimizer_name`` up. It is private: another release may call it otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig  # pyright: ignore[reportMissingImports]

from epi_kernels.optim import MaskedEMAAdamW

NAME = "MaskedEMAAdamW"


def _build(param_groups: list[dict[str, Any]], **options: Any) -> MaskedEMAAdamW:
    """From torchtitan's groups, which carry names apart from parameters, and torch's implementation switches."""
    groups = []
    for group in param_groups:
        own = {k: v for k, v in group.items() if k not in ("params", "param_names", "fused", "foreach")}
        groups.append({**own, "params": list(zip(group["param_names"], group["params"], strict=True))})
    return MaskedEMAAdamW(groups, **options)


class MaskedEMAAdamWContainer(OptimizersContainer):
    """torchtitan's container, which knows ``optimizer_name="MaskedEMAAdamW"`` too."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        return _build if name == NAME else OptimizersContainer._resolve_optimizer_factory(name)


def masked_ema_adamw(
    lr: float = 8e-4,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    no_isolate: str | None = None,
    **options: Any,
) -> MaskedEMAAdamWContainer.Config:
    """``default_adamw`` with isolation: defaults and groups are torchtitan's, every parameter decays.

    ``no_isolate``: a regular expression of parameters that take no part. ``options``: of MaskedEMAAdamW as a whole.
    With pipeline parallelism each model part has an optimizer of its own, hence a share of its own.
    """
    every = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    apart = [(no_isolate, {**every, "isolate": False})] if no_isolate is not None else []
    return MaskedEMAAdamWContainer.Config(
        param_groups=[
            ParamGroupConfig(pattern=pattern, optimizer_name=NAME, optimizer_kwargs=kwargs)
            for pattern, kwargs in [*apart, (r".*", every)]
        ],
        optimizer_factory_kwargs_by_name={NAME: options},
    )
