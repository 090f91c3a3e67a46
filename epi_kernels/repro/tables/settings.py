"""Forgetting where EPI's paper has not looked and names it as future work: little data, a model that sees."""

from __future__ import annotations

from collections.abc import Sequence

from epi_kernels.repro.preset import Pair, Preset
from epi_kernels.repro.runs import Run
from epi_kernels.repro.tables import access, plans
from epi_kernels.repro.tables.access import NoPlan
from epi_kernels.repro.tables.base import Manifests, Rendered
from epi_kernels.repro.tables.frontier import Frontier
from epi_kernels.repro.tables.mixtures import length
from epi_kernels.repro.tables.results import pair_name

SOURCE = "ours; EPI names it as future work"


class Elsewhere:
    """The table `frontier` of one of the preset's settings."""

    source = SOURCE

    def __init__(self, plan: str, title: str, note: str) -> None:
        self.name, self.title, self._plan, self._note = plan.replace("_", "-"), title, plan, note

    def runs(self, preset: Preset) -> Sequence[Run]:
        under = self._under(preset)
        return self._frontier(preset, under).runs(under)

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        under = self._under(preset)
        return self._frontier(preset, under).render(under, found)

    def _under(self, preset: Preset) -> Preset:
        setting = getattr(preset, self._plan)
        if setting is None:
            raise NoPlan(f"--table {self.name}: preset {preset.name} has no plan `{self._plan}`")
        return preset.under(setting)

    def _frontier(self, preset: Preset, under: Preset) -> Frontier:
        cut = [
            f"{100 * one.share:g} % of {one.kind}" for one in plans.sequential_tasks(under) if one.share < 1
        ]
        notes = [
            *([self._note] if self._note else []),
            length_note(preset, under),
            *([f"Training examples: {', '.join(cut)}."] if cut else []),
            "Nothing was tuned in this setting: every arm has the one setting stated below.",
        ]
        return Frontier(self.name, self.title, SOURCE, tuple(notes))


def length_note(preset: Preset, under: Preset) -> str:
    """How long the setting's stages are, and whether they are as long as with the preset's own tasks."""
    pairs = access.sequential_plan(under, "frontier").pairs
    told = "; ".join(
        f"{pair_name(pair)}: {length(pair.learn)} of {pair.learn.batch} examples, then {length(pair.adapt)} of"
        f" {pair.adapt.batch}"
        for pair in pairs
    )
    own = {_lengths(pair) for pair in preset.sequential.pairs} if preset.sequential else set()
    cut = any(one.share < 1 for one in plans.sequential_tasks(under))
    if all(_lengths(pair) in own for pair in pairs):
        where = "in the table frontier"
        if all(recipe.steps for pair in pairs for recipe in (pair.learn, pair.adapt)):
            more = ", not as many epochs: every example is seen more often" if cut else ""
            return f"Length. {told}: as many steps as {where}{more}."
        return f"Length. {told}: as many epochs as {where}{', so that steps shrink with the data' if cut else ''}."
    return f"Length. {told}."


def _lengths(pair: Pair) -> tuple:
    return tuple((one.steps, one.epochs, one.batch) for one in (pair.learn, pair.adapt))


LOW_RESOURCE = Elsewhere(
    "low_resource",
    "Forgetting with little data",
    "",
)
VISION = Elsewhere(
    "vision",
    "Forgetting of a model that sees",
    "A vision tower, a projector and a language model, all of random weights at first; the base model has learned to"
    " say what stands where in a picture. All three are trained, isolated and counted alike.",
)
