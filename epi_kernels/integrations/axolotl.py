"""Axolotl: a plugin that hands its trainer our optimizer; options stand under ``masked_ema_adamw:``.

See configs/axolotl.yaml. The hook: ``BasePlugin.post_trainer_create(cfg, trainer)`` (axolotl/integrations/base.py,
0.19.0), called before the trainer makes its optimizer. ``BasePlugin.create_optimizer`` is there too, but 0.19.0 never
calls it.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel

from epi_kernels.integrations.plain import from_plain
from epi_kernels.integrations.transformers import add_isolation_callback, masked_ema_adamw

# what Axolotl's own optimizer code would do with these, a factory's optimizer does not
UNSUPPORTED = ("loraplus_lr_ratio", "embedding_lr_scale", "embedding_lr", "lr_groups")


class MaskedEMAAdamWArgs(BaseModel):
    """Keys that Axolotl's config gains."""

    masked_ema_adamw: dict[str, Any] | None = None


class MaskedEMAAdamWPlugin(BasePlugin):
    """Learning rate, betas, eps and weight decay stay where Axolotl has them."""

    def get_input_args(self) -> str:
        return f"{__name__}.{MaskedEMAAdamWArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Also adds the callback that logs every refresh.

        Raises:
            ValueError: the config asks for another optimizer of Axolotl's own, or for learning rates by group.
        """
        if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
            raise ValueError(
                f"optimizer: {cfg.optimizer} brings an optimizer of its own; "
                "use optimizer: adamw_torch beside this plugin"
            )
        asked = [name for name in UNSUPPORTED if getattr(trainer.args, name, None) is not None]
        if asked:
            raise ValueError(f"MaskedEMAAdamWPlugin does not support {', '.join(asked)}")
        factory, kwargs = masked_ema_adamw(trainer.args, **from_plain(dict(cfg.masked_ema_adamw or {})))
        # Axolotl's trainer hands a factory its arguments by position, transformers' by keyword alone
        positional = hasattr(trainer, "create_optimizer_grouped_parameters")
        trainer.optimizer_cls_and_kwargs = (
            factory,
            {k: v for k, v in kwargs.items() if not (positional and k == "args")},
        )
        add_isolation_callback(trainer)
