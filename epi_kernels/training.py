"""Bytes of an optimizer's state, whichever optimizer it is."""

from __future__ import annotations

import torch

from epi_kernels.distributed.shards import local


def state_bytes(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of an optimizer's state by kind, and their "total": MaskedEMAAdamW's own account, or torch.optim.AdamW's tensors.

    Of sharded ones, what lies on this rank.
    """
    own = getattr(optimizer, "state_bytes", None)
    if own is not None:
        return own()
    kinds = {"exp_avg": 0, "exp_avg_sq": 0, "other": 0}
    for state in optimizer.state.values():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):  # a count of steps
                continue
            kinds[name if name in kinds else "other"] += local(value).nbytes
    return {**kinds, "total": sum(kinds.values())}
