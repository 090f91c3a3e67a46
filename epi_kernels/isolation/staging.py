"""Stage 2: in which order the groups are trained. The paper names these orders and evaluates the random one.

random      a shuffle by seed
smallest    fewest tasks first
largest     most tasks first
frozen      the set frozen in the first stages as small as it can be: first the group with the smallest union of
            cores, then always the one that adds least to it
curriculum  easiest first, by a difficulty given for each task; a group's is the mean of its tasks'

Groups that tie keep their order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch

from .core_file import Core, CoreSource, byte_slices, open_core, require_same_model
from .errors import IsolationError
from .overlap import popcount

ORDERS = ("random", "smallest", "largest", "frozen", "curriculum")


def order_groups(
    groups: Sequence[Sequence[int]],
    order: str = "random",
    *,
    seed: int = 0,
    cores: Sequence[CoreSource] | None = None,
    difficulty: Sequence[float] | None = None,
) -> list[list[int]]:
    """The groups (of task positions) in the order of their stages; the module's docstring has the orders.

    `cores` (order "frozen"; files or what was read of them) and `difficulty` ("curriculum") have one entry a task.

    Raises:
        IsolationError (a ValueError): an unknown order, or one whose cores or difficulties are not there.
    """
    found = [list(group) for group in groups]
    tasks = sum(map(len, found))
    if order == "random":
        random.Random(seed).shuffle(found)
        return found
    if order in ("smallest", "largest"):
        return sorted(found, key=len, reverse=order == "largest")
    if order == "frozen":
        if cores is None or len(cores) != tasks:
            raise IsolationError(f"order 'frozen' needs the cores of all {tasks} tasks")
        return _smallest_frozen(found, [open_core(one) for one in cores])
    if order == "curriculum":
        if difficulty is None or len(difficulty) != tasks or not all(map(math.isfinite, difficulty)):
            raise IsolationError(
                f"order 'curriculum' needs a difficulty, a number, for each of {tasks} tasks"
            )
        return sorted(found, key=lambda group: sum(difficulty[task] for task in group) / len(group))
    raise IsolationError(f"order is {order!r}; allowed: {', '.join(ORDERS)}")


def _smallest_frozen(groups: list[list[int]], cores: Sequence[Core]) -> list[list[int]]:
    require_same_model(cores)
    ordered: list[list[int]] = []
    left = list(groups)
    while len(left) > 1:
        frozen = [task for group in ordered for task in group]
        sizes = [0] * len(left)
        for name, begin, end in byte_slices(cores[0]):
            masks = [core.packed(name, begin, end) for core in cores]
            for i, group in enumerate(left):
                union = torch.zeros(end - begin, dtype=torch.uint8, device="cpu")
                for task in (*frozen, *group):
                    union |= masks[task]
                sizes[i] += popcount(union)
        ordered.append(left.pop(sizes.index(min(sizes))))
    return ordered + left
