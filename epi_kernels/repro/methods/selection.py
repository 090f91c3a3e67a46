"""Masks that no optimizer makes by itself: the top of given importances, the lowest scores, a random draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from epi_kernels.optim import MaskedEMAAdamW
from epi_kernels.reference.stats import score


def top_share(importance: Mapping[str, Tensor], ratio: float, **options: Any) -> dict[str, Tensor]:
    """bool masks of the top `ratio` by EPI's own refresh, so that they are the masks it would make.

    `importance`: fp32 tensors by name. `options`: normalization, scope, layer_key of MaskedEMAAdamW. Takes as much
    memory again three times over, for a moment.
    """
    optimizer = MaskedEMAAdamW(list(importance.items()), isolation_ratio=ratio, mask_interval=None, **options)
    state = {i: {"step": 0.0, "exp_avg_sq": one} for i, one in enumerate(importance.values())}
    names = list(importance)
    groups = [{"params": list(range(len(names))), "param_names": names}]
    optimizer.carry_importance({"state": state, "param_groups": groups})
    optimizer.refresh_isolation_mask()
    return {name: optimizer.isolation_mask(one) for name, one in importance.items()}


def lowest(importance: Sequence[Tensor], count: int, seed: int) -> list[Tensor]:
    """bool masks of the `count` lowest scores (min-max within a tensor, then global).

    Every tensor's minimum scores 0: which of those that tie at the bound are taken is drawn by `seed`.
    """
    scores = []
    for one in importance:
        u = one.flatten().float()
        if u.numel():  # an empty tensor has no minimum
            low, high = u.aminmax()
            u = score(u, low, high - low, None, 1.0)
        scores.append(u.nan_to_num_(torch.inf))
    flat = torch.cat(scores)
    chosen = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    if count:
        bound = flat.topk(count, largest=False, sorted=False).values.max()
        chosen = flat < bound
        ties = (flat == bound).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(ties), generator=generator)[: count - int(chosen.sum())]
        chosen[ties[drawn.to(ties.device)]] = True
    parts = chosen.split([one.numel() for one in importance])
    return [part.view(one.shape) for part, one in zip(parts, importance, strict=True)]


def random_masks(params: Sequence[Tensor], count: int, seed: int) -> list[Tensor]:
    """bool masks of exactly `count` elements, drawn from all of `params` alike, on the first one's device."""
    device = params[0].device  # a CPU takes 5 s for 5 million of 50 million
    ends = torch.tensor([param.numel() for param in params], device=device).cumsum(0)
    total = int(ends[-1])
    generator = torch.Generator(device).manual_seed(seed)
    chosen = torch.empty(0, dtype=torch.int64, device=device)
    while len(chosen) < count:  # elements drawn twice are drawn anew, so every set of this size is as likely
        more = torch.randint(total, (count - len(chosen),), generator=generator, device=device)
        chosen = torch.cat([chosen, more]).unique()
    cuts = torch.searchsorted(chosen, ends)
    masks, first = [], 0
    for param, end, cut in zip(params, ends.tolist(), cuts.tolist(), strict=True):
        mask = torch.zeros(param.numel(), dtype=torch.bool, device=device)
        mask[chosen[first:cut] - (end - param.numel())] = True
        masks.append(mask.view(param.shape).to(param.device))
        first = cut
    return masks


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def named(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        name: param
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }


def install(optimizer: MaskedEMAAdamW, masks: Mapping[str, Tensor], *, persistent: bool = False) -> None:
    """Masks by name, all of the optimizer's."""
    for name, param in named(optimizer).items():
        optimizer.set_isolation_mask(param, masks[name], persistent=persistent)
