"""Masks that no optimizer makes by itself: the top of given importances, the lowest scores, a random draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from epi_kernels.optim import MaskedEMAAdamW
from epi_kernels.reference.stats import score

KEY_OF_INFINITY = 0x7F800000


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

    Every tensor's minimum scores 0: which of those that tie at the bound are taken is drawn by `seed`. Scores are made a
    tensor at a time, once for each bit of the bound: no tensor holds those of all, which may be more than 2^31.
    """

    def scores(u: Tensor) -> Tensor:  # fp32, not negative; what is not a number is the highest
        u = u.flatten().float()
        if u.numel():  # an empty tensor has no minimum
            low, high = u.aminmax()
            u = score(u, low, high - low, None, 1.0)
        return u.nan_to_num(torch.inf)

    def at_most(key: int) -> int:
        return sum(int((scores(one).view(torch.int32) <= key).sum()) for one in importance)

    masks = [torch.zeros(one.shape, dtype=torch.bool, device=one.device) for one in importance]
    if not count:
        return masks
    low, high = 0, KEY_OF_INFINITY  # the order of floats that are not negative is that of their bits
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if at_most(middle) >= count else (middle + 1, high)
    ties = []
    for mask, one in zip(masks, importance, strict=True):
        keys = scores(one).view(torch.int32)
        mask.view(-1).copy_(keys < low)
        ties.append((keys == low).nonzero().squeeze(1))
    ends = torch.tensor([len(one) for one in ties]).cumsum(0)
    generator = torch.Generator().manual_seed(seed)
    left = count - sum(int(mask.sum()) for mask in masks)
    drawn = torch.randperm(int(ends[-1]), generator=generator)[:left]
    of = torch.searchsorted(ends, drawn, right=True)
    for index, (mask, tied) in enumerate(zip(masks, ties, strict=True)):
        places = drawn[of == index] - (ends[index] - len(tied))
        mask.view(-1)[tied[places.to(tied.device)]] = True
    return masks


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
