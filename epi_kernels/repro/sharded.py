"""`--fsdp`: a stage whose weights, gradients and optimizer states lie over the ranks while it trains (FSDP2).

Each rank holds the whole model before the stage, on the host, and after it, where it is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.measure import ALWAYS, asked
from epi_kernels.repro.runs import Run, Train

# Those whose optimizer steps parts of parameters. The others look at whole tensors (published, mofo: a tensor's largest;
# window, inverted, ewc, l2sp: values of their own beside the weights), take gradients themselves (pcgrad), or replace
# the model (lora).
METHODS = ("full", "epi", "static", "random", "replay")


def refuse(runs: Iterable[Run]) -> None:
    """Raises ReproError when one of these runs cannot be made on sharded weights."""
    trained = [run for run in runs if isinstance(run, Train)]
    methods = sorted({run.method.name for run in trained} - set(METHODS))
    observers = sorted({asked(text).name for run in trained for text in run.observe} - set(ALWAYS))
    if methods:
        raise ReproError(
            f"--fsdp: {', '.join(methods)} cannot train sharded weights, only {', '.join(METHODS)} can; "
            "leave --fsdp out, or choose other tables"
        )
    if observers:
        raise ReproError(
            f"--fsdp: what {', '.join(observers)} measures needs whole gradients; leave --fsdp out, or choose other tables"
        )


@torch.no_grad()
def gather(model: Any, whole: Any) -> Any:
    """`whole`, a model of the same class, with the weights of a sharded one. A call of all ranks."""
    for (name, value), (same, into) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert name == same
        into.copy_(value.full_tensor())
    return whole
