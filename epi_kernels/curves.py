"""A refresh in scalars, by the names that every training loop here logs them under."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def isolation_scalars(report: Mapping[str, Any]) -> dict[str, float]:
    """What makes a curve of ``IsolationReport.as_dict()``. ``isolation/share``: isolated of all elements, 0 to 1."""
    elements = sum(row["elements"] for row in report["layers"])
    found = {"isolation/share": report["isolated"] / elements if elements else 0.0}
    found |= {f"isolation/{name}": report[name] for name in ("ratio", "jaccard", "entered", "released")}
    if report["interval"] is not None:  # masks that are refreshed by hand have none
        found["isolation/interval"] = report["interval"]
    return found
