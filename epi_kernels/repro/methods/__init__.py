"""Ways to fine-tune, by the name of their config. What bench/ takes from here imports no pydantic: keep this file lazy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from epi_kernels.repro.stage import Stage

    from .base import Running
    from .config import Method

# name of the config -> "module:class"; the class is called with (config, stage)
METHODS = {
    "full": "full:Full",
    "epi": "epi:Epi",
    "published": "epi:PublishedEpi",
    "window": "window:Window",
    "static": "masks:Static",
    "random": "masks:RandomMask",
    "inverted": "masks:Inverted",
    "ewc": "penalties:Ewc",
    "l2sp": "penalties:L2Sp",
    "replay": "replay:Replay",
    "lora": "lora:Lora",
    "mofo": "mofo:Mofo",
    "pcgrad": "pcgrad:PcGrad",
}


def make_method(config: Method, stage: Stage) -> Running:
    """The method of a config, ready for the stage's first step; it may replace `stage.model` (LoRA does).

    Before a stopped stage goes on, load the model's weights, then the optimizer's and the method's state into what this
    gives.

    Raises:
        ReproError: what the method takes over from the run before is not there.
    """
    module, name = METHODS[config.name].split(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)(config, stage)
