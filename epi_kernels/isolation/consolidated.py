"""Stage 4, consolidated training: groups in sequence on sampled data, cores frozen by persistent masks.

What is frozen has two readings in the paper (section 2.5), and both are here:

"earlier"  "At each training stage, the frozen parameter set consists of the union of core regions from all
           previously trained task groups": nothing in the first stage, then what the groups before it hold. The
           default.
"all"      "all core parameter regions identified in the earlier probe stage are frozen"; section 5: "with all core
           parameters frozen at once and non-core parameter regions updated in sequence for each group".

The single-stage variant of section 5 is one stage on "the randomly shuffled union of all sampled task data" with
the same masks as the "all" reading; under "earlier" it would freeze nothing, and is refused.

A frozen element is blocked in the optimizer's step itself: no gradient, momentum, weight decay or rounding moves it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from epi_kernels.optim import MaskedEMAAdamW
from epi_kernels.optim.compact import check_granularity, has_persistent_mask
from epi_kernels.optim.names import bare_name
from epi_kernels.optim.wrapped import unwrapped

from .checkpoints import require_same_shapes
from .core_file import Core, CoreSource, byte_slices, open_core, require_same_model, union_mask
from .errors import IsolationError

READINGS = ("earlier", "all")
T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """One stage: the tasks whose data are trained on, and those whose cores are frozen meanwhile (task positions)."""

    tasks: tuple[int, ...]
    frozen: tuple[int, ...]


def plan_stages(
    groups: Sequence[Sequence[int]], reading: str = "earlier", *, single_stage: bool = False
) -> list[Stage]:
    """The stages of groups in their order (`staging.order_groups`); the module's docstring has the readings.

    Raises:
        IsolationError (a ValueError): an unknown reading; a single stage under "earlier"; a task in two groups.
    """
    if reading not in READINGS:
        raise IsolationError(f"reading is {reading!r}; allowed: {', '.join(READINGS)}")
    everyone = tuple(task for group in groups for task in group)
    if len(set(everyone)) != len(everyone):
        raise IsolationError("a task is in two groups")
    if single_stage:
        if reading != "all":
            raise IsolationError("a single stage has no earlier groups: reading 'all' freezes every core")
        return [Stage(everyone, everyone)]
    stages, earlier = [], ()
    for group in groups:
        stages.append(Stage(tuple(group), earlier if reading == "earlier" else everyone))
        earlier += tuple(group)
    return stages


def sample_stage(
    datasets: Mapping[int, Sequence[T]] | Sequence[Sequence[T]], tasks: Sequence[int], share: float, seed: int
) -> list[T]:
    """A stage's data: equally many examples of each of its `tasks` (positions in `datasets`), shuffled.

    `datasets` are those of all stages' tasks: of all together about `share` is sampled. Which examples a task gives
    depends on `seed` and its position alone, so that stages and a single stage learn from "identical sampled datasets"
    (section 5). The paper samples "small proportions of data from each task group" at a ratio "chosen to ensure balanced
    representation" that it does not print. A task with fewer examples than its part gives all that it has; every
    task gives one at least.

    Raises:
        IsolationError (a ValueError): share outside (0, 1], or a task without data.
    """
    if not 0 < share <= 1:
        raise IsolationError(f"share is {share!r}; allowed: above 0 and at most 1")
    positions = datasets.keys() if isinstance(datasets, Mapping) else range(len(datasets))
    sizes = {task: len(datasets[task]) for task in positions}
    if not tasks or not all(sizes.get(task) for task in tasks):
        raise IsolationError("every task of a stage needs data")
    each = max(1, round(share * sum(sizes.values()) / len(sizes)))
    chosen: list[T] = []
    for task in tasks:
        rng = random.Random(f"{seed} {task}")
        count = min(each, sizes[task])
        chosen += [datasets[task][i] for i in sorted(rng.sample(range(sizes[task]), count))]
    random.Random(seed).shuffle(chosen)
    return chosen


def freeze(optimizer: Optimizer, cores: Sequence[CoreSource], *, partial: bool = False) -> int:
    """Makes the union of these cores the optimizer's persistent masks, in place of those it has; none lifts them.

    Works at any isolation ratio, 0 included. Returns how many elements are frozen. `partial`: a core may hold
    elements of parameters that this optimizer does not step.

    Raises:
        TypeError: it is no MaskedEMAAdamW.
        IsolationError (a ValueError): parameters without names, or cores of another model. Nothing has changed then.
        ValueError: cores that are not of whole rows or blocks, where the optimizer has such an `isolation_granularity`;
            likewise.
    """
    optimizer = unwrapped(optimizer, "cores are frozen by")
    opened = [open_core(core) for core in cores]
    named = _named(optimizer)
    require_same_model(opened)
    if opened:
        require_cores_of(opened, {name: tuple(param.shape) for name, param in named.items()}, partial=partial)
    by_element = optimizer._config.isolation_granularity == "element"
    for name, param in named.items() if opened and not by_element else ():  # of any before one is installed
        check_granularity(union_mask(opened, name), param, optimizer._config, name)
    frozen = 0
    for name, param in named.items():
        if opened:
            mask = union_mask(opened, name)
            frozen += int(mask.sum())
        elif has_persistent_mask(optimizer.state.get(param, {})):
            mask = torch.zeros(param.shape, dtype=torch.bool)
        else:
            continue
        optimizer.set_isolation_mask(param, mask.to(param.device), persistent=True)
    return frozen


def require_cores_of(
    cores: Sequence[Core], shapes: Mapping[str, tuple[int, ...]], *, partial: bool = False
) -> None:
    """Raises IsolationError unless the cores are of a model with these parameters.

    Names that the model lacks are no fault where the core is empty: a checkpoint may hold buffers.
    """
    require_same_model(cores)
    first = cores[0]
    surplus = {name for name in first.shapes if name not in shapes}
    if not partial and surplus:
        held = {
            name
            for name, begin, end in byte_slices(first)
            if name in surplus and _any(cores, name, begin, end)
        }
        surplus -= held
    found = {name: shape for name, shape in first.shapes.items() if name not in surplus}
    require_same_shapes(first.label, found, shapes, "the model")


def _any(cores: Sequence[Core], name: str, begin: int, end: int) -> bool:
    return any(bool(core.packed(name, begin, end).any()) for core in cores)


def _named(optimizer: MaskedEMAAdamW) -> dict[str, Tensor]:
    if not all("param_names" in group for group in optimizer.param_groups):
        raise IsolationError(
            "cores know parameters by name, and this optimizer's have none: make it with (name, tensor) pairs, "
            "e.g. MaskedEMAAdamW(model.named_parameters())"
        )
    return {
        bare_name(name): param
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }


def consolidate(
    stages: Sequence[Stage],
    cores: Sequence[CoreSource],
    make_optimizer: Callable[[Stage], MaskedEMAAdamW],
    train: Callable[[Stage, MaskedEMAAdamW], None],
) -> None:
    """Runs the stages, each with an optimizer of its own whose persistent masks are the cores it freezes.

    `cores`: one a task. `make_optimizer(stage)` gives a MaskedEMAAdamW over the model's named parameters
    (isolation_ratio=0 for CPI-FT alone), `train(stage, optimizer)` trains the model with it, on `sample_stage`'s
    data say.

    Raises:
        IsolationError (a ValueError): a stage names a task without a core, or as `freeze`; earlier stages have been
        trained then.
    """
    opened = [open_core(core) for core in cores]
    tasks = [task for stage in stages for task in (*stage.tasks, *stage.frozen)]
    if not all(0 <= task < len(opened) for task in tasks):
        raise IsolationError(f"the stages name tasks up to {max(tasks)}, there are {len(opened)} cores")
    require_same_model(opened)
    for stage in stages:
        optimizer = make_optimizer(stage)
        freeze(optimizer, [opened[task] for task in stage.frozen])
        train(stage, optimizer)
