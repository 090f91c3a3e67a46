"""Work on processes of one thread each, which count the training steps they make.

One thread each: models this small gain nothing from a second, and the numbers then do not depend on how many
workers there are.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

_counter: Any = None  # of this process, where it is a worker


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tick() -> None:
    """In a worker: one step more."""
    with _counter.get_lock():
        _counter.value += 1


@contextlib.contextmanager
def processes(workers: int) -> Iterator[tuple[Executor, Callable[[], int]]]:
    """The processes, and how many steps they have counted so far; where the block raises, work under way is broken off."""
    # Spawned, not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("l", 0)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _start, (counter,))
    try:
        yield pool, lambda: counter.value
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # or shutdown waits for the work under way
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(counter: Any) -> None:
    import torch

    global _counter
    _counter = counter
    # Ctrl-C is the parent's to handle, without a traceback from every worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
