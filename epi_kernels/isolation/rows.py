"""Whole rows or blocks of the highest importance, isolated for good: what a next stage keeps, at no state of its own.

With `isolation_granularity="row"` or `"block"` such an optimizer has state for the others alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from epi_kernels.distributed.shards import is_sharded
from epi_kernels.optim import MaskedEMAAdamW
from epi_kernels.optim.arguments import shares_importance
from epi_kernels.optim.compact import expanded, unit_elements, whole_masks
from epi_kernels.optim.entries import Entry
from epi_kernels.optim.home import home
from epi_kernels.optim.moments import read_moment
from epi_kernels.optim.wrapped import unwrapped
from epi_kernels.reference import bits

from .errors import IsolationError


class _Units(NamedTuple):
    """The rows, or blocks, of one parameter."""

    param: Tensor
    scores: Tensor  # [units] fp64, inf: isolated for good already, nan: not to be isolated
    sizes: Tensor  # [units] int64, elements


@torch.no_grad()
def isolate_rows(optimizer: Optimizer, share: float) -> int:
    """Isolates persistently what has the highest mean importance, beside what is isolated so already.

    Of the parameters that take part in isolation and have two dimensions or more: rows (along dim 0), or blocks where the
    optimizer has `isolation_granularity="block"`. Importances are normalised within each parameter, (u - min) / (max - min),
    and averaged over a row; then rows of all parameters are taken, the highest first, until the next one would go beyond
    floor(share * elements), those isolated already counted. A row of importance 0, or of one that is not finite, is never
    taken. Each parameter's importance is held once in float32 for it. Returns the elements isolated persistently.

    Raises:
        TypeError: it is no MaskedEMAAdamW.
        IsolationError (a ValueError): share outside [0, 1], DTensor parameters, or no importance yet. Nothing has changed
            then.
    """
    optimizer = unwrapped(optimizer, "rows are isolated by")
    if not 0 <= share <= 1:
        raise IsolationError(f"share is {share!r}; allowed: 0 to 1")
    entries = [entry for entry in optimizer._parameters() if entry.group["isolate"] and entry.param.ndim > 1]
    sharded = [entry.name for entry in entries if is_sharded(entry.param)]
    if sharded:
        raise IsolationError(
            f"{sharded[0]} is a DTensor, whose rows lie on many ranks: isolate rows before sharding"
        )
    found = list(_scored(optimizer, entries))
    if not found:
        raise IsolationError(
            "there is no importance yet: train first, or carry_importance() from another optimizer"
        )
    scores, sizes = (
        torch.cat([getattr(units, what).cpu() for units in found]) for what in ("scores", "sizes")
    )
    budget = math.floor(share * sum(entry.param.numel() for entry in entries))
    order = torch.argsort(scores.nan_to_num(nan=-1.0), descending=True, stable=True)
    fits = sizes[order].cumsum(0) <= budget
    taken = torch.zeros(len(scores), dtype=torch.bool, device="cpu")
    taken[order] = fits & (scores[order] > 0)
    taken |= scores == torch.inf
    for units, chosen in zip(found, taken.split([len(units.sizes) for units in found]), strict=True):
        if bool(chosen.any()):
            held = _persistent(optimizer, units.param)
            mask = chosen.to(held.device).repeat_interleave(units.sizes).view(held.shape) | held
            optimizer.set_isolation_mask(units.param, mask.to(units.param.device), persistent=True)
    return sum(int(_persistent(optimizer, units.param).sum()) for units in found)


def _persistent(optimizer: MaskedEMAAdamW, param: Tensor) -> Tensor:
    """Where the parameter's state lies, as scores and sizes do."""
    packed = whole_masks(optimizer.state.get(param, {}), param).get("persistent_mask")
    if packed is None:
        return torch.zeros(param.shape, dtype=torch.bool, device=home(param, optimizer._config))
    return bits.unpack(packed, param.numel()).view(param.shape)


def _scored(optimizer: MaskedEMAAdamW, entries: list[Entry]) -> Iterator[_Units]:
    for entry in entries:
        param, state = entry.param, optimizer.state.get(entry.param, {})
        if not state or not param.numel():
            continue
        key = "exp_avg_sq" if shares_importance(entry.group) else "importance"
        u = read_moment(expanded(state, param), key, param.shape, entry.name).float().view(-1)
        finite = u.isfinite()
        low, high = torch.where(finite, u, torch.inf).min(), torch.where(finite, u, -torch.inf).max()
        scale = (high - low) if bool(high > low) else torch.ones_like(low)
        lasting = _persistent(optimizer, param).view(-1)
        size = unit_elements(param, "block" if optimizer._config.isolation_granularity == "block" else "row")
        means, isolated, sizes = [], [], []
        whole = u.numel() // size * size
        for part, held in ((u[:whole], lasting[:whole]), (u[whole:], lasting[whole:])):
            if part.numel():
                rows = part.view(-1, min(size, part.numel()))
                means.append((rows.mean(dim=1, dtype=torch.float64) - low) / scale)
                isolated.append(held.view(rows.shape).all(dim=1))
                sizes.append(torch.full((len(rows),), rows.shape[1], dtype=torch.int64, device=u.device))
        scores = torch.cat(means)
        scores = torch.where(scores.isfinite(), scores, torch.nan)
        yield _Units(param, torch.where(torch.cat(isolated), torch.inf, scores), torch.cat(sizes))
