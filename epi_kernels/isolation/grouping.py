"""Stage 2: tasks in one group when a chain of similarities >= tau joins them (connected components)."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import IsolationError

TAU = 0.1  # the paper's


def group_tasks(similarity: Sequence[Sequence[float]], tau: float = TAU) -> list[list[int]]:
    """Groups of task positions, each in rising order, in the order of their first tasks. tau = 0 gives one group.

    Raises:
        IsolationError (a ValueError): tau outside [0, 1], or a matrix that is not square.
    """
    if not 0 <= tau <= 1:
        raise IsolationError(f"tau is {tau!r}; allowed: 0 to 1")
    count = len(similarity)
    if any(len(row) != count for row in similarity):
        raise IsolationError("the similarities must be a square matrix, tasks by tasks")
    leader = list(range(count))

    def find(task: int) -> int:
        while leader[task] != task:
            leader[task] = leader[leader[task]]
            task = leader[task]
        return task

    for i in range(count):
        for j in range(i):
            if similarity[i][j] >= tau:
                high, low = max(find(i), find(j)), min(find(i), find(j))
                leader[high] = low
    groups: dict[int, list[int]] = {}
    for task in range(count):
        groups.setdefault(find(task), []).append(task)
    return list(groups.values())
