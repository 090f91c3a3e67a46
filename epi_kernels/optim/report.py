"""What a refresh did. Figures stay on the device until they are read."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from epi_kernels.optim.arguments import INT8, shares_importance
from epi_kernels.policies.layers import LayerTable
from epi_kernels.reference.mask import ENTERED, ISOLATED, RELEASED


def callers_level() -> int:
    """The ``stacklevel`` of a warning that is to point past this package and torch's wrappers of ``step``."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("epi_kernels", "torch", "functools"):
            break
        frame, level = frame.f_back, level + 1
    return level


def warn_nothing_selected(ratio: float, eligible: int) -> None:
    warnings.warn(
        f"isolation_ratio={ratio} of {eligible} eligible elements is less than one element: nothing is isolated. "
        "Raise isolation_ratio.",
        stacklevel=callers_level(),
    )


def warn_unused_importance_dtype(param_groups: Iterable[Mapping[str, Any]], dtype: torch.dtype) -> None:
    """Where no group has an importance of its own. float32, the default, may not have been asked for."""
    if dtype != torch.float32 and all(map(shares_importance, param_groups)):
        asked = "int8" if dtype == INT8 else dtype
        warnings.warn(
            f"importance_dtype={asked} has no effect: the importance of every group is exp_avg_sq, whose dtype is state_dtype. "
            "Give importance_beta a value other than beta2 for an importance of its own",
            stacklevel=callers_level(),
        )


def jaccard(isolated: int, entered: int, released: int) -> float:
    """Overlap of the old and the new mask: |old and new| / |old or new|, 1 for two empty masks."""
    union = isolated + released
    return (isolated - entered) / union if union else 1.0


@dataclass(frozen=True)
class LayerRow:
    """One layer's share of a refresh; counts are elements."""

    name: str
    elements: int
    isolated: int
    entered: int
    released: int
    jaccard: float
    nonfinite: int

    def __getitem__(self, field: str) -> Any:
        return getattr(self, field)


class IsolationReport:
    """Figures of one refresh. Reading any but ``step``, ``ratio`` and ``interval`` waits for the device once.

    Attributes:
        step: T, the calls of ``step()`` before the refresh.
        ratio: p, the isolation ratio asked for.
        interval: H, the mask interval that now holds; None when masks are never refreshed by themselves.
        threshold: the k-th largest score (inf when k = 0); for ``scope="layer"`` a dict by layer name.
        jaccard: overlap of the old and the new mask, 1 for two empty masks.
        isolated, entered, released: elements isolated now; newly so; no longer so.
        ties: elements at or above the threshold, beyond k.
        nonfinite: elements whose importance is not finite: counted in N, never isolated. The first
            reading warns when there are any; on CPUs the refresh itself reads it.
        layers: one ``LayerRow`` a layer.
    """

    def __init__(
        self,
        *,
        step: int,
        ratio: float,
        interval: int | None,
        scope: str,
        table: LayerTable,
        k: list[int],  # per domain
        threshold: Tensor,  # [domains] fp32
        count_ge: Tensor,  # [domains] int64
        domain: list[int],  # per layer
        drift: Tensor,  # [layers, 3] int64
        nonfinite: Tensor,  # [layers] int64
    ) -> None:
        self.step = step
        self.ratio, self.interval = ratio, interval
        self._scope, self._table, self._k, self._domain = scope, table, k, domain
        self._threshold, self._count_ge, self._drift, self._nonfinite = threshold, count_ge, drift, nonfinite

    @property
    def on_host(self) -> bool:
        """Reading waits for no device."""
        return self._nonfinite.device.type == "cpu"

    @property
    def selects_nothing(self) -> bool:
        """k is 0 everywhere: the ratio asks for less than one element."""
        return not any(self._k)

    @functools.cached_property
    def layers(self) -> tuple[LayerRow, ...]:
        table, rows = self._table, []
        for row, (counts, nonfinite) in enumerate(
            zip(self._drift.tolist(), self._nonfinite.tolist(), strict=True)
        ):
            isolated, entered, released = counts[ISOLATED], counts[ENTERED], counts[RELEASED]
            if not table.eligible[row] and isolated + released == 0:
                continue  # takes no part, and never did
            overlap = jaccard(isolated, entered, released)
            rows.append(
                LayerRow(
                    table.names[row], table.n_elements[row], isolated, entered, released, overlap, nonfinite
                )
            )
        return tuple(rows)

    @functools.cached_property
    def threshold(self) -> float | dict[str, float]:
        values = self._threshold.tolist()
        if self._scope == "global":
            return values[0]
        rows = zip(self._table.names, self._table.eligible, self._domain, strict=True)
        return {name: values[domain] for name, eligible, domain in rows if eligible}

    @functools.cached_property
    def ties(self) -> int:
        return sum(max(0, count - k) for count, k in zip(self._count_ge.tolist(), self._k, strict=True))

    @property
    def isolated(self) -> int:
        return sum(row.isolated for row in self.layers)

    @property
    def entered(self) -> int:
        return sum(row.entered for row in self.layers)

    @property
    def released(self) -> int:
        return sum(row.released for row in self.layers)

    @functools.cached_property
    def nonfinite(self) -> int:
        count = int(self._nonfinite.sum())
        if count:
            warnings.warn(
                f"{count} elements have a non-finite importance after step {self.step}: they are never isolated, and "
                "their weights follow the non-finite gradient. Clip gradients or use a GradScaler.",
                stacklevel=callers_level(),
            )
        return count

    @property
    def jaccard(self) -> float:
        return jaccard(self.isolated, self.entered, self.released)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        names = (
            "step",
            "ratio",
            "interval",
            "threshold",
            "jaccard",
            "isolated",
            "entered",
            "released",
            "ties",
            "nonfinite",
        )
        return {name: getattr(self, name) for name in names} | {
            "layers": [asdict(row) for row in self.layers]
        }

    def __repr__(self) -> str:
        return (
            f"IsolationReport(step={self.step}, isolated={self.isolated}, entered={self.entered}, "
            f"released={self.released}, jaccard={self.jaccard:.4f})"
        )


def warn_after_refresh(report: IsolationReport, table: LayerTable, *, warned_before: bool) -> bool:
    """Warns of a ratio below one element, once, and of non-finite importances; returns whether it has of the former."""
    warns = report.selects_nothing and report.ratio > 0 and not warned_before
    if warns:
        warn_nothing_selected(report.ratio, table.total_eligible)
    # reading the count warns; on a GPU it stays there until somebody reads it
    if report.on_host:
        _ = report.nonfinite
    return warned_before or warns
