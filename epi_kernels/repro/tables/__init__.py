"""All tables by name, in the order they are shown."""

from __future__ import annotations

from epi_kernels.repro.preset import Preset
from epi_kernels.repro.tables.access import NoPlan
from epi_kernels.repro.tables.base import Table
from epi_kernels.repro.tables.beyond import Beyond
from epi_kernels.repro.tables.conflict import Conflict
from epi_kernels.repro.tables.drift import Drift
from epi_kernels.repro.tables.frontier import Frontier
from epi_kernels.repro.tables.imbalance import Imbalanced
from epi_kernels.repro.tables.masks import StaticDynamic
from epi_kernels.repro.tables.memory import Memory
from epi_kernels.repro.tables.mixtures import EpiMain, Main, SingleStage
from epi_kernels.repro.tables.sensitivity import CoreRatio, Tau
from epi_kernels.repro.tables.sequential import Changes, ForgettingRate
from epi_kernels.repro.tables.settings import LOW_RESOURCE, VISION
from epi_kernels.repro.tables.stability import Stability
from epi_kernels.repro.tables.sweeps import Beta, Interval, Normalization, Ratio
from epi_kernels.repro.tables.training import Accumulation, Schedule
from epi_kernels.repro.tables.tuning import Tuning

_ALL: tuple[Table, ...] = (
    Frontier(),
    Changes(),
    ForgettingRate(),
    StaticDynamic(),
    Main(),
    EpiMain(),
    SingleStage(),
    Imbalanced(),
    Tau(),
    CoreRatio(),
    Drift(),
    Conflict(),
    Normalization(),
    Ratio(),
    Interval(),
    Beta(),
    Schedule(),
    Accumulation(),
    Stability(),
    Memory(),
    Beyond(),
    LOW_RESOURCE,
    VISION,
    Tuning(),
)
TABLES: dict[str, Table] = {table.name: table for table in _ALL}


def tables_of(preset: Preset) -> list[str]:
    """Names of the tables that the preset has plans for. Raises ReproError where a plan is wrong."""
    found = []
    for name, table in TABLES.items():
        try:
            table.runs(preset)
        except NoPlan:
            continue
        found.append(name)
    return found


__all__ = ["TABLES", "tables_of"]
