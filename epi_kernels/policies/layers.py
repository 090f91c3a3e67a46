"""Which elements are normalised together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

LayerKey = Callable[[str], Hashable]


class Share(NamedTuple):
    """One parameter's share in a layer."""

    param: Tensor | None  # None: it lies on other ranks alone
    name: str
    n_elements: int  # of the whole, however it is sharded
    layer: Hashable  # parameters of one value form a layer
    eligible: bool


@dataclass(slots=True)
class LayerTable:
    """Rows of the layer statistics, in the order of first appearance."""

    names: list[str] = field(default_factory=list)
    n_elements: list[int] = field(default_factory=list)
    eligible: list[bool] = field(default_factory=list)
    row_of: dict[Tensor, int] = field(default_factory=dict)
    counted: set[Tensor] = field(
        default_factory=set
    )  # what this rank counts; others count what it also holds

    @property
    def total_eligible(self) -> int:
        return sum(n for n, eligible in zip(self.n_elements, self.eligible, strict=True) if eligible)


def build_layers(shares: Iterable[Share]) -> LayerTable:
    """Empty tensors are left out, and everything that is here is counted here.

    Parameters that take no part in isolation get rows of their own, apart from eligible ones of the same layer.
    """
    table, rows = LayerTable(), {}
    for share in shares:
        if share.n_elements == 0:
            continue
        row = rows.setdefault((share.layer, share.eligible), len(table.names))
        if row == len(table.names):
            table.names.append(str(share.layer))
            table.n_elements.append(0)
            table.eligible.append(share.eligible)
        table.n_elements[row] += share.n_elements
        if share.param is not None:
            table.row_of[share.param] = row
            table.counted.add(share.param)
    return table
