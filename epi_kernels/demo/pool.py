"""Runs the stages on worker processes, and counts steps for the progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait

from epi_kernels.demo.protocol import Arm, Settings, StageA, StageB, learn_a, learn_b
from epi_kernels.workers import processes, tick


def _worker_a(settings: Settings, seed: int) -> StageA:
    return learn_a(settings, seed, tick)


def _worker_b(settings: Settings, before: StageA, arm: Arm) -> StageB:
    return learn_b(settings, before, arm, tick)


def run_all(
    settings: Settings,
    seeds: Sequence[int],
    arms: Sequence[Arm],
    workers: int,
    show: Callable[[int], None],
) -> tuple[list[StageA], list[StageB]]:
    """Both stages of every seed, in the order of seeds and arms; `show` gets the number of steps done so far."""
    if workers == 1:
        return _run_here(settings, seeds, arms, show)
    with processes(workers) as (pool, ticks):
        return _drive(pool, settings, seeds, arms, lambda: show(ticks()))


def _drive(
    pool: Executor, settings: Settings, seeds: Sequence[int], arms: Sequence[Arm], show: Callable[[], None]
) -> tuple[list[StageA], list[StageB]]:
    """Stage B of a seed is queued as soon as its stage A is there."""
    pending: set[Future] = {pool.submit(_worker_a, settings, seed) for seed in seeds}
    learned: dict[int, StageA] = {}
    outcomes: dict[tuple[int, str], StageB] = {}
    while pending:
        done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in done:
            result = future.result()
            if isinstance(result, StageA):
                learned[result.seed] = result
                pending |= {pool.submit(_worker_b, settings, result, arm) for arm in arms}
            else:
                outcomes[result.seed, result.arm] = result
        show()
    return [learned[seed] for seed in seeds], [outcomes[seed, arm.key] for seed in seeds for arm in arms]


def _run_here(
    settings: Settings, seeds: Sequence[int], arms: Sequence[Arm], show: Callable[[int], None]
) -> tuple[list[StageA], list[StageB]]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        show(done)

    try:
        learned = [learn_a(settings, seed, tick) for seed in seeds]
        return learned, [learn_b(settings, before, arm, tick) for before in learned for arm in arms]
    finally:
        torch.set_num_threads(threads)
