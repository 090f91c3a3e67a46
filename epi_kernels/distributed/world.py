"""The ranks whose parameters are selected together: agreement before anything is reduced, then sums and maxima.

A refresh costs one small all-reduce a stage, but one for each counting pass of the threshold: bytes are in ``World``'s
docstring. A pass tells as many parts of the keys apart as it has counters, so the exact k-th of 2^30 keys (minmax) takes
three of 2,048 counters, 16 KiB each; two would take 256 KiB each, and one a counter for every key. An
ordinary step costs none.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from epi_kernels.distributed.meeting import check_steps, meeting, raise_first
from epi_kernels.distributed.shards import Shard, shard_of
from epi_kernels.policies.layers import LayerKey, LayerTable, Share, build_layers
from epi_kernels.reference.stats import LayerStats

Value = TypeVar("Value")
_REFUSED = 2  # above a rank whose layout has changed


def first_rank() -> bool:
    """Whether this process writes what one alone may write."""
    return not dist.is_initialized() or dist.get_rank() == 0


def by_all(prepare: Callable[[], Value]) -> Value:
    """What ``prepare()`` gives, where no rank's refuses; a call of all ranks.

    Raises:
        Exception: what it raised here; ValueError with another rank's words where it did there alone.
    """
    found, refused, heard = None, None, []
    try:
        found = prepare()
    except Exception as error:
        refused = error
    if dist.is_initialized():
        heard = [None] * dist.get_world_size()
        dist.all_gather_object(heard, None if refused is None else str(refused))
    raise_first(heard, refused)
    return found  # type: ignore[return-value]  # prepare() has ended


def on_first_rank(write: Callable[[], Value]) -> Value:
    """``write()`` by the first rank; a call of all ranks, which go on when it is done, with what it gave.

    Raises:
        Exception: what it raised, on every rank.
    """
    heard: list[Any] = [None, None]
    if first_rank():
        try:
            heard[0] = write()
        except Exception as error:
            heard[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(heard, src=0)
    given, refused = heard
    if refused is not None:
        raise refused
    return given


@dataclass(frozen=True)
class Holding:
    """What one rank holds of one parameter, and what the ranks that hold others of its parts must agree on."""

    name: str
    layer: Hashable
    eligible: bool
    shard: Shard
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Agreement:
    """What the ranks found when they compared their holdings."""

    shares: list[Share]  # of all ranks, each parameter once, in the order of the ranks
    counted: frozenset[str]  # names of the parameters whose part here is counted here, not on another rank
    layout: int  # digest of what was compared


class World:
    """Reductions over a process group, of values that every rank has in the same shape.

    Bytes a refresh: 40 to open it (do all ranks mean the same one?); 8 a layer for the extrema (zscore: 24 more, of
    float64 sums); 8 a bin and domain for each counting pass, 16 KiB with a global threshold: two to five passes, mostly
    three; 32 a layer for the report.

    Raises:
        ValueError: ``group`` is no process group of this rank's.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                f"a process group of torch.distributed that this rank is in is needed, got {group!r}"
            )
        self.group = group  # None: all ranks
        self._agreement: Agreement | None = None

    def __deepcopy__(self, memo: dict) -> World:
        return World(self.group)  # a process group is the process's, not the optimizer's

    def __reduce__(self) -> tuple:
        if self.group is not None:
            raise TypeError(
                "an optimizer with set_process_group cannot be pickled: a process group does not travel. Save its "
                "state_dict(), and set the group of the one that loads it"
            )
        return World, ()

    # ---------------------------------------------------------------- agreement

    @property
    def agreed(self) -> bool:
        return self._agreement is not None

    def forget(self) -> None:
        """The ranks compare again before the next step; all of them forget, or none."""
        self._agreement = None

    def agree(
        self,
        holdings: Sequence[Holding],
        settings: dict[str, Any],
        step: int,
        *,
        votes: bool = False,
        refused: Exception | None = None,
    ) -> bool:
        """All ranks compare what they hold, how they are set and where they are. Returns whether all vote yes.

        Raises:
            ValueError: on every rank: they do not agree, or a parameter's parts do not make up the whole.
            Exception: ``refused``, for which this rank cannot go on; a ValueError with its words on the others.
        """
        ranks: list[Any] = [None] * dist.get_world_size(self.group)
        words = None if refused is None else str(refused)
        with meeting(step):
            dist.all_gather_object(ranks, (list(holdings), settings, step, votes, words), group=self.group)
        raise_first([words for *_, words in ranks], refused)
        _check_settings([settings for _, settings, *_ in ranks])
        check_steps([step for _, _, step, *_ in ranks], step)
        rank = dist.get_rank(self.group)
        self._agreement = _compare([held for held, *_ in ranks], rank, _layout(holdings))
        return all(vote for *_, vote, _ in ranks)

    def open_refresh(
        self,
        holdings: Sequence[Holding],
        settings: dict[str, Any],
        step: int,
        device: torch.device,
        refused: Exception | None = None,
    ) -> None:
        """All ranks refresh now, after the same step; one whose parameters or options have changed makes all compare
        again, one that cannot (``refused``) all refuse.

        Raises:
            ValueError: on every rank: they are at different steps, or do not agree.
            Exception: ``refused``; a ValueError with its words on the others.
        """
        if self._agreement is None:  # on all ranks, or on none
            self.agree(holdings, settings, step, refused=refused)
            return
        stale = int(_layout(holdings) != self._agreement.layout) if refused is None else _REFUSED
        said = (sorted(settings.items()), [one.options for one in holdings])
        digest = zlib.crc32(repr(said).encode())
        seen = torch.tensor([stale, step, -step, digest, -digest], dtype=torch.int64, device=device)
        with meeting(step):
            dist.all_reduce(seen, dist.ReduceOp.MAX, group=self.group)
        any_stale, last, first, high, low = seen.tolist()
        if any_stale == _REFUSED:
            self.agree(holdings, settings, step, refused=refused)
        check_steps([-first, last], step)
        if any_stale or high != -low:
            self.agree(holdings, settings, step)

    def layers(self, params: dict[str, Tensor]) -> LayerTable:
        """The layers of all ranks; rows of ``params`` (by name) among them."""
        assert self._agreement is not None
        table = build_layers(share._replace(param=params.get(share.name)) for share in self._agreement.shares)
        table.counted = {param for name, param in params.items() if name in self._agreement.counted}
        return table

    # ---------------------------------------------------------------- reductions

    def any(self, here: bool, device: torch.device) -> bool:
        """Whether it holds on some rank."""
        flag = torch.tensor(int(here), dtype=torch.int64, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)

    def union(self, here: set[tuple[str, str]]) -> set[tuple[str, str]]:
        """Of all ranks' sets."""
        ranks: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(ranks, here, group=self.group)
        return set().union(*ranks)

    def sum_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self.group)

    def merge_stats_(self, stats: LayerStats) -> None:
        """Extrema and, for zscore, the sums of all ranks. Counts of non-finite elements stay this rank's but for zscore,
        which needs them now; else they go with the report's."""
        extrema = torch.stack([-stats.minimum, stats.maximum])
        dist.all_reduce(extrema, dist.ReduceOp.MAX, group=self.group)
        stats.minimum, stats.maximum = -extrema[0], extrema[1]
        if stats.with_moments:
            counts = stats.nonfinite.double()  # exact below 2^53
            sums = torch.cat([stats.moments, counts.unsqueeze(1)], dim=1)
            dist.all_reduce(sums, group=self.group)
            stats.moments, stats.nonfinite = sums[:, :2].contiguous(), sums[:, 2].long()

    def sum_report_(self, drift: Tensor, stats: LayerStats) -> None:
        """Counts of all ranks: ``drift`` [layers, 3] int64, and the non-finite elements where they are not yet."""
        nonfinite = stats.nonfinite if not stats.with_moments else torch.zeros_like(stats.nonfinite)
        counts = torch.cat([drift, nonfinite.unsqueeze(1)], dim=1)
        dist.all_reduce(counts, group=self.group)
        drift.copy_(counts[:, :3])
        if not stats.with_moments:
            stats.nonfinite = counts[:, 3].contiguous()


def holding(
    param: Tensor, name: str, *, eligible: bool, layer_key: LayerKey | None, options: dict[str, Any]
) -> Holding:
    shard = shard_of(param)
    assert shard is not None, "refused when the parameter joined"
    layer = name if layer_key is None else layer_key(name)
    return Holding(name, layer, eligible, shard, tuple(sorted(options.items())))


def _layout(holdings: Sequence[Holding]) -> int:
    """Digest of what may change between refreshes; options follow schedules, and are compared with the layout alone."""
    return zlib.crc32(repr([(one.name, one.layer, one.eligible, one.shard) for one in holdings]).encode())


def _check_settings(ranks: Sequence[dict[str, Any]]) -> None:
    for number, settings in enumerate(ranks):
        for name, value in settings.items():
            if value != ranks[0][name]:
                raise ValueError(
                    f"ranks disagree on {name}: {ranks[0][name]!r} on rank 0, {value!r} on rank {number}; "
                    "give every rank the same"
                )


def _compare(ranks: Sequence[Sequence[Holding]], rank: int, layout: int) -> Agreement:
    first: dict[str, tuple[int, Holding]] = {}
    owner: dict[str, dict[Shard, int]] = {}
    for number, holdings in enumerate(ranks):
        for held in holdings:
            earlier, one = first.setdefault(held.name, (number, held))
            for what in ("layer", "eligible"):
                _check_same(held.name, what, (earlier, getattr(one, what)), (number, getattr(held, what)))
            for (what, value), (_, other) in zip(one.options, held.options, strict=True):
                _check_same(held.name, what, (earlier, value), (number, other))
            _check_same(held.name, "shape", (earlier, one.shard.whole), (number, held.shard.whole))
            if held.shard.n_elements:
                owner.setdefault(held.name, {}).setdefault(held.shard, number)
    for name, (_, held) in first.items():
        parts = list(owner.get(name, {}))
        n_elements = sum(part.n_elements for part in parts)
        whole = math.prod(held.shard.whole)
        if n_elements != whole:
            raise ValueError(
                f"the parts of {name} on {len(ranks)} ranks hold {n_elements} different elements of {whole}: parts of other "
                "meshes are mixed in, or ranks of its mesh are missing (set_process_group)"
            )
    counted = frozenset(held.name for held in ranks[rank] if owner.get(held.name, {}).get(held.shard) == rank)
    shares = [
        Share(None, name, math.prod(held.shard.whole), held.layer, held.eligible)
        for name, (_, held) in first.items()
    ]
    return Agreement(shares, counted, layout)


def _check_same(name: str, what: str, one: tuple[int, Any], other: tuple[int, Any]) -> None:
    if one[1] != other[1]:
        raise ValueError(
            f"ranks disagree on the {what} of {name}: {one[1]!r} on rank {one[0]}, {other[1]!r} on rank {other[0]}"
        )
