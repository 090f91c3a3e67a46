"""Functions run on several ranks: real processes that talk over gloo on the CPU."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # FSDP2 imports it at its first use, which takes seconds: once, before the ranks are forked
import torch.distributed as dist


@dataclass(frozen=True)
class Failed:
    """What a rank raised."""

    kind: str
    message: str
    text: str


def _child(rank: int, n_ranks: int, folder: str, function: Callable[..., Any], arguments: tuple) -> None:
    # what torchrun sets; the group is made from a file, so nobody listens at the address
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    torch.set_num_threads(1)  # a forked process must not use its parent's threads
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=n_ranks,
            timeout=datetime.timedelta(seconds=60),
        )
        result = function(rank, *arguments)
    except BaseException as error:  # torch.distributed.checkpoint raises some of these
        result = Failed(type(error).__name__, str(error), traceback.format_exc())
    Path(folder, f"{rank}.partial").write_bytes(pickle.dumps(result))
    Path(folder, f"{rank}.partial").rename(Path(folder, str(rank)))
    if not isinstance(result, Failed):
        dist.destroy_process_group()


def outcomes(n_ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """``function(rank, *arguments)`` of every rank: what it returned, or ``Failed``. A rank that hangs fails the test."""
    context = multiprocessing.get_context("fork")  # torch is imported already
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_child, args=(rank, n_ranks, folder, function, arguments), daemon=True)
            for rank in range(n_ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        found = [Path(folder, str(rank)) for rank in range(n_ranks)]
        said = [pickle.loads(path.read_bytes()) if path.exists() else None for path in found]
    texts = "\n".join(one.text for one in said if isinstance(one, Failed))
    assert not hanging, f"ranks {hanging} of {n_ranks} hang\n{texts}"
    missing = [rank for rank, path in enumerate(found) if said[rank] is None and processes[rank].exitcode]
    assert not missing, f"ranks {missing} of {n_ranks} died\n{texts}"
    return said


def on_ranks(n_ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """As ``outcomes``, of a function that must not fail."""
    said = outcomes(n_ranks, function, *arguments, timeout=timeout)
    failed = [one.text for one in said if isinstance(one, Failed)]
    assert not failed, "\n".join(failed)
    return said
