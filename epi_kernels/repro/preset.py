"""Presets: what the tables are made of, at one size. A YAML file with these keys and no others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from epi_kernels.repro.arms import Arm, Arms, Rate, Try
from epi_kernels.repro.config import (
    Count,
    Distinct,
    ModelSpec,
    Recipe,
    Schedule,
    Share,
    Strict,
    TaskSpec,
    repeated,
)
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.methods.config import Epi, Full
from epi_kernels.repro.runs import Fusion, Order
from epi_kernels.repro.strict_yaml import read_yaml
from epi_kernels.repro.tasks import KINDS

PRESETS = Path(__file__).parent / "presets"
Decay = Annotated[float, Field(gt=0, lt=1)]
Similarity = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(gt=0, le=1)]
Some = Field(min_length=1)


class Pair(Strict):
    """Tasks learned one after the other; no data of the first in the second stage."""

    first: str
    second: str
    learn: Recipe  # of the first
    adapt: Recipe  # of the second; full fine-tuning's learning rates are `full_lrs`

    @model_validator(mode="after")
    def _two_tasks(self) -> Pair:
        if self.first == self.second:
            raise ValueError(f"{self.first} is both the first and the second task")
        return self


class Sequential(Strict):
    """Forgetting: CPI-FT's Table 2, EPI's forgetting table, and dA@B against full fine-tuning's frontier."""

    pairs: tuple[Pair, ...]
    full_lrs: Annotated[tuple[Rate, ...], Distinct, Field(min_length=2)]  # full fine-tuning's frontier
    alphas: Annotated[tuple[Share, ...], Distinct] = (
        0.3,
        0.5,
        0.7,
    )  # WiSE-FT's frontier, from each of full fine-tuning's runs
    arms: Arms
    tuning_seed: int = 0  # never among the seeds of a table


class CpiFtPlan(Strict):
    probe: Recipe
    stage: Recipe
    consolidation: Recipe
    share: Part = 0.1
    core_ratio: Share = 0.01
    tau: Similarity = 0.1
    order: Order = "random"  # of the groups' stages
    fusion: Fusion = "slerp"
    omega: Share | None = None
    taus: Annotated[tuple[Similarity, ...], Distinct] = ()  # the sensitivity figures; tau 0 is one group
    ratios: Annotated[tuple[Share, ...], Distinct] = ()


class Mixture(Strict):
    """All tasks at once: CPI-FT's Tables 1 and 3, EPI's main comparison."""

    tasks: tuple[str, ...] = Some
    recipe: Recipe  # its steps are the budget; staged methods divide them by the number of stages
    arms: Arms
    random_stages: Count = 3
    heuristic: tuple[tuple[str, ...], ...] = ()  # the two stages of the heuristic grouping
    cpift: CpiFtPlan


class Imbalance(Strict):
    """Each task in turn cut to a share of its data: CPI-FT's Table 4."""

    tasks: tuple[str, ...] = Some
    shares: Annotated[tuple[Part, ...], Distinct, Some] = (1.0, 0.5, 0.2, 0.1)
    recipe: Recipe
    arms: Arms
    cpift: CpiFtPlan


class Sweep(Strict):
    """EPI's ablations: one value after the other about the arm `of` of `sequential`, on its first pair."""

    of: str
    ratios: Annotated[tuple[Share, ...], Distinct] = ()
    intervals: Annotated[tuple[Count, ...], Distinct] = ()
    betas: Annotated[tuple[Decay, ...], Distinct] = ()
    windows: Annotated[tuple[Count, ...], Distinct] = ()
    schedules: Annotated[tuple[Schedule, ...], Distinct] = ()
    accumulations: Annotated[tuple[Count, ...], Distinct] = ()
    clips: Annotated[tuple[Rate | None, ...], Distinct] = ()


class DriftPlan(Strict):
    """The drift of importance while a mixture is learned, with the ceiling that noise sets and the chance line."""

    tasks: tuple[str, ...] = Some
    recipe: Recipe
    ratios: Annotated[tuple[Share, ...], Distinct, Some] = (0.01, 0.1)
    every: Count = 50  # steps between snapshots


class Setting(Strict):
    """Forgetting elsewhere: `sequential` once more, with what differs from the preset's own. Nothing is tuned there."""

    models: dict[str, ModelSpec] | None = Field(default=None, min_length=1)
    pretrain: Recipe | None = None
    tasks: dict[str, TaskSpec] | None = None
    sequential: Sequential

    @model_validator(mode="after")
    def _untuned(self) -> Setting:
        tuned = [name for name, arm in self.sequential.arms.items() if len(arm.tries) > 1]
        if tuned:
            raise ValueError(f"{', '.join(tuned)}: an arm of a setting has one try")
        return self


class Preset(Strict):
    name: str
    tables: Annotated[
        tuple[str, ...], Distinct
    ] = ()  # what is made where --table names none; empty: all that there are plans for
    seeds: tuple[int, ...] = Field(min_length=1)
    models: dict[str, ModelSpec] = Field(min_length=1)  # the first is the one of tables with one model
    pretrain: Recipe | None = None  # for models made from configs
    tasks: dict[str, TaskSpec]
    sequential: Sequential | None = None
    mixture: Mixture | None = None
    imbalance: Imbalance | None = None
    sweep: Sweep | None = None
    drift: DriftPlan | None = None
    low_resource: Setting | None = None  # little data for either task
    vision: Setting | None = None  # a model that sees

    @model_validator(mode="after")
    def _names_are_known(self) -> Preset:
        named: list[str] = []
        for pair in self.sequential.pairs if self.sequential else ():
            named += [pair.first, pair.second]
        for place in ("mixture", "imbalance", "drift"):
            plan = getattr(self, place)
            named += plan.tasks if plan else ()
            if plan and (twice := repeated(plan.tasks)):
                raise ValueError(f"{place}.tasks: {twice[0]} stands there twice")
        pairs = [(pair.first, pair.second) for pair in (self.sequential.pairs if self.sequential else ())]
        if twice := repeated(pairs):
            raise ValueError(f"sequential.pairs: {' then '.join(twice[0])} stands there twice")
        for stage in self.mixture.heuristic if self.mixture else ():
            named += stage
        for name, spec in self.tasks.items():
            if spec.kind not in KINDS:
                raise ValueError(
                    f"tasks.{name}: no kind of task is called {spec.kind!r}; there are {', '.join(KINDS)}"
                )
        unknown = sorted(set(named) - set(self.tasks))
        if unknown:
            raise ValueError(f"no such task under tasks: {', '.join(unknown)}")
        if wrong := self._wrong_seeds(self.seeds):
            raise ValueError(wrong)
        if self.sweep:
            self._check_sweep(self.sweep)
        for setting in filter(None, (self.low_resource, self.vision)):
            self.under(setting)
        return self

    def _wrong_seeds(self, seeds: Sequence[int]) -> str | None:
        """What is wrong with them. One that stands there twice would count as two and narrow every interval."""
        if twice := repeated(seeds):
            return f"the seed {twice[0]} stands there twice"
        outside = [seed for seed in seeds if not 0 <= seed < 2**32]
        if outside:
            return f"the seed {outside[0]} is not from 0 to 2**32 - 1"
        plans = [self.sequential, *(one.sequential for one in (self.low_resource, self.vision) if one)]
        tuned = [plan.tuning_seed for plan in plans if plan and plan.tuning_seed in seeds]
        if tuned:
            return f"{tuned[0]} is the tuning seed, on which the settings were chosen"
        return None

    def _check_sweep(self, sweep: Sweep) -> None:
        plan = self.sequential
        if plan is None or sweep.of not in plan.arms:
            raise ValueError(f"sweep.of {sweep.of!r} is no arm of sequential")
        if not isinstance(plan.arms[sweep.of].settled.method, Epi):
            raise ValueError(f"sweep.of {sweep.of!r} is not an arm of EPI")
        for pair in plan.pairs[:1]:
            uneven = [count for count in sweep.accumulations if pair.adapt.batch % count]
            if uneven:
                raise ValueError(
                    f"sweep.accumulations: a batch of {pair.adapt.batch} has no {uneven[0]} equal parts"
                )

    def under(self, setting: Setting) -> Preset:
        """A preset of that setting alone. Raises ValueError where its names are not known."""
        return Preset(
            name=self.name,
            seeds=self.seeds,
            models=setting.models or self.models,
            pretrain=setting.pretrain or self.pretrain,
            tasks=setting.tasks or self.tasks,
            sequential=setting.sequential,
        )

    def with_seeds(self, seeds: Sequence[int]) -> Preset:
        """The same with other seeds. Raises ReproError."""
        if wrong := self._wrong_seeds(list(seeds)):
            raise ReproError(f"--seeds: {wrong}")
        return self.model_copy(update={"seeds": tuple(seeds)})

    def without(self, arms: Sequence[str]) -> Preset:
        """The same without some arms and those that are like them, in whichever plans they are: those that a device has
        no room for, say.

        Raises ReproError for an arm that is nowhere, or that the sweep is of.
        """
        plans = {
            name: plan for name in ("sequential", "mixture", "imbalance") if (plan := getattr(self, name))
        }
        settings = {name: one for name in ("low_resource", "vision") if (one := getattr(self, name))}
        of_all = [*plans.values(), *(one.sequential for one in settings.values())]
        known = list(dict.fromkeys(arm for plan in of_all for arm in plan.arms))
        if unknown := [arm for arm in arms if arm not in known]:
            raise ReproError(
                f"--without {', '.join(unknown)}: no such arm; there are {', '.join(known) or 'none'}"
            )
        if self.sweep and self.sweep.of in arms:
            raise ReproError(f"--without {self.sweep.of}: the sweep is of that arm")

        def less(plan: Any) -> Any:
            kept = {arm: one for arm, one in plan.arms.items() if not {arm, one.like} & {*arms}}
            return plan.model_copy(update={"arms": kept})

        left = {name: less(plan) for name, plan in plans.items()}
        left |= {
            name: one.model_copy(update={"sequential": less(one.sequential)})
            for name, one in settings.items()
        }
        return self.model_copy(update=left)


def load_preset(name: str) -> Preset:
    """One of the presets that come with the package, or a YAML file. Raises ReproError."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    try:
        return Preset.model_validate(read_yaml(path.read_bytes()))
    except OSError as error:
        known = ", ".join(sorted(one.stem for one in PRESETS.glob("*.yaml")))
        raise ReproError(
            f"--preset {name}: cannot be read ({error.strerror}); {known}, or a .yaml file"
        ) from None
    except yaml.YAMLError as error:
        raise ReproError(f"--preset {name}: is not YAML ({' '.join(str(error).split())})") from None
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, one['loc'])) or 'preset'}: {one['msg']}" for one in error.errors()
        )
        raise ReproError(f"--preset {name}: {wrong}") from None


__all__ = ["Arm", "Full", "Preset", "Try", "load_preset"]
