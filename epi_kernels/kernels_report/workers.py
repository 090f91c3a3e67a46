"""Processes that compile Triton's kernels: two of them compile twice as fast as one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from epi_kernels.workers import usable_cores

Task = TypeVar("Task")
Result = TypeVar("Result")


def default_jobs() -> int:
    return min(usable_cores(), 8)


def in_workers(function: Callable[[Task], Result], tasks: Sequence[Task], jobs: int | None) -> list[Result]:
    """``function`` of every task, in processes that compile whatever this one does."""
    jobs = jobs or default_jobs()
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            return list(pool.map(function, tasks, chunksize=1))
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
