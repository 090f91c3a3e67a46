"""Forgetting where EPI's paper has not looked and names it as future work: little data, a model that sees."""

from __future__ import annotations

from collections.abc import Sequence

from epi_kernels.repro.preset import Preset
from epi_kernels.repro.runs import Run
from epi_kernels.repro.tables import plans
from epi_kernels.repro.tables.access import NoPlan
from epi_kernels.repro.tables.base import Manifests, Rendered
from epi_kernels.repro.tables.frontier import Frontier

SOURCE = "ours; EPI names it as future work"


class Elsewhere:
    """The table `frontier` of one of the preset's settings."""

    source = SOURCE

    def __init__(self, plan: str, title: str, note: str) -> None:
        self.name, self.title, self._plan, self._note = plan.replace("_", "-"), title, plan, note

    def runs(self, preset: Preset) -> Sequence[Run]:
        under = self._under(preset)
        return self._frontier(under).runs(under)

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        under = self._under(preset)
        return self._frontier(under).render(under, found)

    def _under(self, preset: Preset) -> Preset:
        setting = getattr(preset, self._plan)
        if setting is None:
            raise NoPlan(f"--table {self.name}: preset {preset.name} has no plan `{self._plan}`")
        return preset.under(setting)

    def _frontier(self, under: Preset) -> Frontier:
        cut = [
            f"{100 * one.share:g} % of {one.kind}" for one in plans.sequential_tasks(under) if one.share < 1
        ]
        notes = [
            self._note,
            *([f"Training examples: {', '.join(cut)}."] if cut else []),
            "Nothing was tuned in this setting: every arm has the one setting stated below.",
        ]
        return Frontier(self.name, self.title, SOURCE, tuple(notes))


LOW_RESOURCE = Elsewhere(
    "low_resource",
    "Forgetting with little data",
    "The number of steps does not shrink with the data, so that every example is seen more often.",
)
VISION = Elsewhere(
    "vision",
    "Forgetting of a model that sees",
    "A vision tower, a projector and a language model, all of random weights at first; the base model has learned to"
    " say what stands where in a picture. All three are trained, isolated and counted alike.",
)
