"""CPI-FT in full: which runs it is made of is known only once the cores of its probe runs are.

probes -> cores -> groups -> a stage a group -> fusion -> consolidated stages
"""

from __future__ import annotations

from collections.abc import Sequence

from epi_kernels.isolation import group_tasks, jaccard_matrix, order_groups, plan_stages
from epi_kernels.isolation.core_file import CoreFile
from epi_kernels.repro.config import TaskSpec
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.manifest import Manifest
from epi_kernels.repro.methods.config import Full
from epi_kernels.repro.runs import CpiFt, Fuse, Run, Tasks, Train, chain
from epi_kernels.repro.tasks import make_task
from epi_kernels.repro.weights import core_of
from epi_kernels.repro.workshop import Workshop


def groups_of(run: CpiFt, shop: Workshop) -> tuple[list[list[int]], list[list[float]]]:
    """(groups of task positions in the order of their stages, similarities). tau = 0 is one group: every pair has an
    edge. A call of all ranks."""
    cores = [CoreFile(core_of(probe, run.core_ratio, shop)) for probe in run.probes]
    similarity = jaccard_matrix(cores)
    groups = group_tasks(similarity, run.tau)
    difficulty = None
    if run.order == "curriculum":  # the harder a task, the lower its probe run scores on it
        difficulty = [-_own_score(probe, task, shop) for probe, task in zip(run.probes, run.tasks)]
    return order_groups(groups, run.order, seed=run.seed, cores=cores, difficulty=difficulty), similarity


def _own_score(probe: Run, task: TaskSpec, shop: Workshop) -> float:
    """As a share of the full mark: a judge's 10 points and 100 % are the same. Raises ReproError."""
    manifest = shop.store.manifest(probe)
    assert manifest is not None, "a parent is finished"
    if task.kind not in manifest.scores:
        raise ReproError(
            f"run {manifest.key}: a probe that was not scored on {task.kind} says nothing of its difficulty"
        )
    return manifest.scores[task.kind] / make_task(task).full_mark


def unfold(run: CpiFt, groups: list[list[int]]) -> Run:
    """The last of the runs that this one is, the others nested inside."""
    backbone = chain(
        run.before,
        tuple(_of(run, group) for group in groups),
        evaluate=(),
        recipe=run.stage,
        method=Full(),
        seed=run.seed,
    )
    last: Run = Fuse(
        backbone=backbone,
        probes=run.probes,
        core_ratio=run.core_ratio,
        method=run.fusion,
        omega=run.omega,
        evaluate=run.evaluate,
        seed=run.seed,
    )
    for stage in plan_stages(groups, run.reading, single_stage=run.single_stage):
        last = Train(
            before=last,
            tasks=_of(run, stage.tasks),
            sampled=run.sampled,
            sampled_of=run.tasks,
            evaluate=run.evaluate,
            recipe=run.consolidation,
            method=Full(optimizer="epi"),
            frozen=tuple(run.probes[task] for task in stage.frozen),
            core_ratio=run.core_ratio,
            seed=run.seed,
        )
    return last


def _of(run: CpiFt, tasks: Sequence[int]) -> Tasks:
    return tuple(run.tasks[task] for task in tasks)


def describe(groups: list[list[int]], similarity: list[list[float]], run: CpiFt, last: Manifest) -> dict:
    """For the manifest's notes."""
    return {
        "groups": [[run.tasks[task].kind for task in group] for group in groups],
        "similarity": [[round(value, 4) for value in row] for row in similarity],
        "last": last.key,
    }
