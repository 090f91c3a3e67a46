"""Which elements are normalised together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

LayerKey = Callable[[str], Hashable]


@dataclass(slots=True)
class LayerTable:
    """Rows of the layer statistics, in the order of first appearance."""

    names: list[str] = field(default_factory=list)
    n_elements: list[int] = field(default_factory=list)
    eligible: list[bool] = field(default_factory=list)
    row_of: dict[Tensor, int] = field(default_factory=dict)

    @property
    def total_eligible(self) -> int:
        return sum(n for n, eligible in zip(self.n_elements, self.eligible, strict=True) if eligible)


def build_layers(params: Iterable[tuple[Tensor, str, bool]], layer_key: LayerKey | None) -> LayerTable:
    """One row a parameter, or one a value of ``layer_key``; (tensor, name, eligible) in, empty tensors left out.

    Parameters that take no part in isolation get rows of their own, apart from eligible ones of the same key.
    """
    table, rows = LayerTable(), {}
    for param, name, eligible in params:
        if param.numel() == 0:
            continue
        key = name if layer_key is None else layer_key(name)
        row = rows.setdefault((key, eligible), len(table.names))
        if row == len(table.names):
            table.names.append(str(key))
            table.n_elements.append(0)
            table.eligible.append(eligible)
        table.n_elements[row] += param.numel()
        table.row_of[param] = row
    return table
