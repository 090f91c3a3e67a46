"""All tasks learned together: CPI-FT's Tables 1 and 3, EPI's main comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from epi_kernels.repro import published_values as printed
from epi_kernels.repro.config import Recipe
from epi_kernels.repro.methods.config import Epi, Static
from epi_kernels.repro.preset import CpiFtPlan, Imbalance, Mixture, Preset
from epi_kernels.repro.runs import Run
from epi_kernels.repro.tables import access, paper, plans
from epi_kernels.repro.tables.base import Cell, Manifests, Rendered, Table
from epi_kernels.repro.tables.results import ISOLATION, Results, Rows, RunOf, metrics
from epi_kernels.repro.tables.words import INTERVALS, compared, setting

FULL, CPIFT = "full SFT, all tasks at once", "CPI-FT"
AVERAGE = "average, 0-10"
AVERAGE_NOTE = "Average: every task's score on 0-10, score / full mark * 10, then the mean over tasks, as CPI-FT's text defines it; in brackets, where there are any, its printed scores by the same formula, which are not its printed averages."
EPI_PRINTS = (
    f"{printed.EPI_GAIN[0]:+.2f} to {printed.EPI_GAIN[1]:+.2f} in the average over static isolation on four backbones; on"
    " the best backbone "
    + ", ".join(f"{task} {score:g}" for task, score in printed.EPI_BEST["epi"].items())
    + f". {printed.EPI_SOURCE.rstrip('.')}"
)


def length(recipe: Recipe) -> str:
    return f"{recipe.steps} steps" if recipe.steps is not None else f"{recipe.epochs:g} epochs"


def budget(plan: Mixture | Imbalance) -> str:
    """A note: what every method may train for, what CPI-FT takes beside it, and how many settings were tried."""
    recipe, cpift = plan.recipe, plan.cpift
    most = max((len(arm.tries) for arm in plan.arms.values()), default=1)
    tuned = (
        "Nothing was tuned here: full SFT, multi-stage, CPI-FT and every arm have one setting."
        if most == 1
        else f"Arms had {most} tries each, multi-stage fine-tuning and CPI-FT one."
    )
    return (
        f"Budget: {length(recipe)} of {recipe.batch} examples; multi-stage methods divide the steps among the stages"
        f" (epochs are of a stage's own data). CPI-FT trains {length(cpift.probe)} a task to probe,"
        f" {length(cpift.stage)} a group, and {length(cpift.consolidation)} a stage on {100 * cpift.share:g} % of the"
        f" data to consolidate{_less_usual(cpift)}. {tuned}"
    )


def _less_usual(cpift: CpiFtPlan) -> str:
    """What of its fusion and of its stages' order is no default."""
    changed = cpift.model_dump(include={"order", "fusion", "omega"}, exclude_defaults=True)
    return "".join(f"; {name} {value}" for name, value in changed.items())


def score_rows(
    rows: Rows, model: str, methods: Mapping[str, RunOf], printed_as: Mapping[str, str]
) -> dict[str, tuple[float, ...]]:
    """A row a method: the score on every task and the average. Returns the averages.

    ``printed_as``: method -> its name in `published_values.TABLE1`, of those that the paper has.
    """
    results, preset = rows.results, rows.results.preset
    tasks, averages = plans.mixture_tasks(preset), {}
    for name, run_of in methods.items():
        averages[name] = results.over_seeds(lambda run: results.average(run, tasks), run_of)
        cells, in_paper = [], printed_as.get(name)
        for spec in tasks:
            values = results.over_seeds(lambda run, spec=spec: results.score(run, spec), run_of)
            beside = paper.task_score(preset, model, in_paper, spec) if in_paper else None
            cells.append(Cell(values=values, paper=beside))
        beside = paper.average(preset, model, in_paper, tasks) if in_paper else None
        average = Cell(values=averages[name], digits=2, paper=beside)
        rows.add(model, name, *cells, average, runs=map(run_of, preset.seeds))
    return averages


def differences(
    ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]
) -> dict[str, tuple[float, ...]]:
    """By place, seed by seed."""
    return {place: tuple(a - b for a, b in zip(ours[place], theirs[place], strict=True)) for place in ours}


def against(
    subject: str, rival: str, by_model: Mapping[str, Mapping[str, Sequence[float]]], claim: bool = True
) -> str:
    """A sentence on two methods' averages, over the models."""
    places = differences(
        {model: averages[subject] for model, averages in by_model.items()},
        {model: averages[rival] for model, averages in by_model.items()},
    )
    return compared(
        subject,
        places,
        f"beats {rival} in the average",
        f"loses to {rival} in the average",
        everywhere=f"on all {len(places)} models",
        digits=2,
        versus=rival,
        claim=claim,
    )


def table1_names(methods: Iterable[str]) -> dict[str, str]:
    """Of the first four methods, which are the paper's and in its order."""
    return dict(zip(methods, (printed.FULL, printed.RANDOM, printed.HEURISTIC, printed.CPIFT)))


class EveryModel(Table):
    """A row for every method on every model, those of Table 1 first."""

    def methods(self, preset: Preset, model: str) -> dict[str, RunOf]:
        raise NotImplementedError

    def runs(self, preset: Preset) -> Sequence[Run]:
        return [
            run_of(seed)
            for model in preset.models
            for run_of in self.methods(preset, model).values()
            for seed in preset.seeds
        ]

    def scored(
        self, preset: Preset, found: Manifests
    ) -> tuple[Rows, dict[str, dict[str, tuple[float, ...]]]]:
        """The rows; and by model, every method's averages."""
        rows, by_model = Rows(Results.of(self, preset, found)), {}
        for model in preset.models:
            methods = self.methods(preset, model)
            by_model[model] = score_rows(rows, model, methods, table1_names(methods))
        return rows, by_model


class Main(EveryModel):
    name = "cpift-1"
    title = "Tasks learned together: full, multi-stage and CPI-FT fine-tuning"
    source = "CPI-FT, Table 1"

    def methods(self, preset: Preset, model: str) -> dict[str, RunOf]:
        plan = access.mixture_plan(preset, self.name)
        heuristic = plans.heuristic_stages(preset)
        full = plans.full_try(plan)
        return {
            FULL: lambda seed: plans.mixture(preset, full, seed, model),
            f"multi-stage, random, K = {plan.random_stages}": lambda seed: plans.stages_run(
                preset, plans.random_stages(preset, seed), seed, model
            ),
            f"multi-stage, heuristic, {len(heuristic)} stages": lambda seed: plans.stages_run(
                preset, heuristic, seed, model
            ),
            CPIFT: lambda seed: plans.mixture_cpift(preset, seed, model),
        }

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        rows, by_model = self.scored(preset, found)
        plan = access.mixture_plan(preset, self.name)
        names = list(next(iter(by_model.values())))
        tasks = plans.mixture_tasks(preset)
        heuristic = " | ".join(", ".join(stage) for stage in plan.heuristic)
        return rows.rendered(
            self,
            ["model", "method", *plans.kinds(tasks), AVERAGE],
            notes=(
                metrics(tasks),
                AVERAGE_NOTE,
                *(printed.INCONSISTENCIES[name] for name in ("average", "range", "lowest", "gsm8k", "qwen")),
                *paper.models_note(preset),
                *paper.not_comparable(preset, tasks, paper.TABLE1_PRINTS),
                printed.NOT_STATED,
                budget(plan),
                f"CPI-FT: p = {100 * plan.cpift.core_ratio:g} %, tau = {plan.cpift.tau:g}. Heuristic stages: {heuristic}."
                " Random stages are drawn anew for every seed.",
                INTERVALS,
            ),
            findings=tuple(against(CPIFT, rival, by_model) for rival in names if rival != CPIFT)
            + tuple(against(name, FULL, by_model) for name in names if name not in (FULL, CPIFT)),
        )


class SingleStage:
    name = "cpift-3"
    title = "CPI-FT's consolidation in several stages and in one"
    source = "CPI-FT, Table 3"
    single = "single stage, all cores frozen"
    multi = "stage by stage, earlier groups' cores frozen"
    multi_all = "stage by stage, all cores frozen"

    def methods(self, preset: Preset) -> dict[str, RunOf]:
        access.mixture_plan(preset, self.name)
        return {
            self.multi: lambda seed: plans.mixture_cpift(preset, seed),
            self.multi_all: lambda seed: plans.mixture_cpift(preset, seed, reading="all"),
            self.single: lambda seed: plans.mixture_cpift(preset, seed, reading="all", single_stage=True),
        }

    def runs(self, preset: Preset) -> Sequence[Run]:
        return [run_of(seed) for run_of in self.methods(preset).values() for seed in preset.seeds]

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        plan, rows = access.mixture_plan(preset, self.name), Rows(Results.of(self, preset, found))
        averages = score_rows(rows, plans.first_model(preset), self.methods(preset), {})
        tasks = plans.mixture_tasks(preset)
        prints = "; ".join(
            f"{name} {row.average:g}, {row.recomputed:.2f} by the formula"
            for name, row in printed.TABLE3.items()
        )
        return rows.rendered(
            self,
            ["model", "consolidation", *plans.kinds(tasks), AVERAGE],
            notes=(
                metrics(tasks),
                AVERAGE_NOTE,
                "All three consolidate on the same sampled examples, as both of the paper's forms do.",
                f"{printed.INCONSISTENCIES['freezing']} Where there is one group, the three rows differ in what is frozen"
                " alone.",
                f"The paper's averages, of a model it does not name and four tasks: {prints}."
                f" {printed.INCONSISTENCIES['table3']}",
                budget(plan),
                INTERVALS,
            ),
            findings=tuple(
                compared(
                    f"CPI-FT {name}",
                    differences({"": averages[name]}, {"": averages[self.single]}),
                    "beats its single-stage form in the average",
                    "loses to its single-stage form in the average",
                    digits=2,
                    versus="its single-stage form",
                )
                for name in (self.multi, self.multi_all)
            ),
        )


class EpiMain(EveryModel):
    name = "epi-main"
    title = "Tasks learned together: every arm of the mixture"
    source = "EPI, main comparison"

    def methods(self, preset: Preset, model: str) -> dict[str, RunOf]:
        plan = access.mixture_plan(preset, self.name)
        arms = {
            name: (lambda seed, one=one: plans.mixture(preset, one, seed, model))
            for name, one in plans.other_arms(plan).items()
        }
        return Main().methods(preset, model) | arms

    def render(self, preset: Preset, found: Manifests) -> Rendered:
        rows, by_model = self.scored(preset, found)
        plan = access.mixture_plan(preset, self.name)
        arms, tasks = plans.other_arms(plan), plans.mixture_tasks(preset)
        evolving = [name for name, one in arms.items() if isinstance(one.method, Epi)]
        rivals = [CPIFT, *(name for name, one in arms.items() if isinstance(one.method, Static))]
        return rows.rendered(
            self,
            ["model", "method", *plans.kinds(tasks), AVERAGE],
            notes=(
                metrics(tasks),
                AVERAGE_NOTE,
                budget(plan),
                arms_note(plan),
                *paper.models_note(preset),
                *paper.not_comparable(preset, tasks, EPI_PRINTS),
                "Static isolation is CPI-FT in the source; the static arms here are masks at a stated ratio.",
                INTERVALS,
            ),
            findings=tuple(
                against(name, FULL, by_model, claim=isinstance(one.method, ISOLATION))
                for name, one in arms.items()
            )
            + tuple(against(name, rival, by_model) for name in evolving for rival in rivals),
        )


def arms_note(plan: Mixture) -> str:
    """Settings of a mixture's arms, and where those that need a stage before them get it."""
    arms = plans.other_arms(plan)
    told = "; ".join(f"{name}: {setting(one)}" for name, one in arms.items())
    probed = [name for name, one in arms.items() if plans.rests_on_a_stage(one.method)]
    rest = (
        f" What {', '.join(probed)} need of a stage before is taken from {length(plan.cpift.probe)} of full SFT on the"
        " same mixture, which count as part of the budget; learning rates start anew after it."
        if probed
        else ""
    )
    return f"Arms, what is no default: {told}.{rest}"
