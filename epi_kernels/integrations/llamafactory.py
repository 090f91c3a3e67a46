"""LLaMA-Factory v1: an optimizer plugin, chosen by ``optim_config: {name: masked_ema_adamw, ...}``.

    python -m epi_kernels.integrations.llamafactory llamafactory_v1.yaml

See configs/llamafactory_v1.yaml. The hook: ``OptimizerPlugin(name).register()``
(llamafactory/v1/plugins/trainer_plugins/optimizer.py, 0.9.5), which ``BaseTrainer._init_optimizer``
(v1/core/base_trainer.py) calls with the model and ``optim_config``. Something has to register before a run begins,
hence a module to start in place of ``llamafactory-cli sft``. Without v1 there is no hook: configs/llamafactory_v0.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from epi_kernels.integrations.groups import named_parameter_groups
from epi_kernels.integrations.plain import from_plain
from epi_kernels.optim import MaskedEMAAdamW

NAME = "masked_ema_adamw"
OF_GROUPS = ("weight_decay", "isolate", "no_isolate")


def build(model: torch.nn.Module, config: Mapping[str, Any]) -> MaskedEMAAdamW:
    """The optimizer for ``optim_config``: options of MaskedEMAAdamW, and those of ``named_parameter_groups``.

    Raises:
        ValueError: no ``lr``: LLaMA-Factory does not hand a plugin its ``learning_rate``.
    """
    options = from_plain({key: value for key, value in config.items() if key != "name"})
    if "lr" not in options:
        raise ValueError("optim_config needs lr: LLaMA-Factory hands no plugin its learning_rate")
    groups = {key: options.pop(key) for key in OF_GROUPS if key in options}
    return MaskedEMAAdamW(named_parameter_groups(model, **groups), **options)


def register() -> None:
    """Makes the plugin known to LLaMA-Factory, in this process."""
    from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin  # pyright: ignore[reportMissingImports]

    OptimizerPlugin(NAME).register()(build)


if __name__ == "__main__":
    from llamafactory.v1.trainers.sft_trainer import run_sft  # pyright: ignore[reportMissingImports]

    register()
    run_sft()
