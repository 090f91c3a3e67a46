"""Where a run's scalars go beside its log: TensorBoard's event files, Weights & Biases. Both are optional packages."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from epi_kernels.files import write_whole

from .errors import UserError

TENSORBOARD, WANDB, NONE = "tensorboard", "wandb", "none"
CHOICES = (TENSORBOARD, WANDB, NONE)
PROJECT = "epi-kernels"  # of W&B, where WANDB_PROJECT names none
ID_FILE = "wandb-id"  # beside the log: a resumed run is the same run there


class Tracker(Protocol):
    name: str

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self, failed: bool) -> None: ...


def chosen(asked: Sequence[str] | None) -> list[str]:
    """The trackers of `--log-to`. None: TensorBoard where it is installed.

    Raises UserError when one that is asked for is not installed.
    """
    if asked is None:
        return [TENSORBOARD] if _installed(TENSORBOARD) else []
    if NONE in asked:
        if len(asked) > 1:
            raise UserError(f"--log-to {' '.join(asked)}: none goes with no other")
        return []
    for name in asked:
        if not _installed(name):
            raise UserError(
                f"--log-to {name}: the package is not installed: pip install {name}, or leave {name} out (`--log-to none` writes log.jsonl alone)"
            )
    return list(dict.fromkeys(asked))


def opened(
    asked: Sequence[str] | None, directory: Path, first: int, label: str, options: Mapping
) -> list[Tracker]:
    """The trackers of `--log-to`, of the run in `directory`, whose next step is `first`: what they hold of later ones is a
    killed run's. One that nobody asked for costs no run where it cannot be opened.

    Raises UserError when one that is asked for cannot be.
    """
    made: list[Tracker] = []
    for name in chosen(asked):
        try:
            if name == TENSORBOARD:
                made.append(EventFiles(directory / TENSORBOARD, first))
            else:
                made.append(WeightsAndBiases(directory, label, options))
        except Exception as error:
            if asked is not None:
                raise (
                    error if isinstance(error, UserError) else UserError(f"--log-to {name}: {error}", 1)
                ) from None
            print(f"{name} gets nothing of this run: {error}", file=sys.stderr)
    return made


class EventFiles:
    """`tensorboard --logdir OUT` shows them."""

    name = "TensorBoard"

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Steps that W&B has of a run that was killed after its last checkpoint stay; the same come again, and are dropped there."""

    name = "W&B"

    def __init__(self, directory: Path, label: str, options: Mapping) -> None:
        wandb: Any = importlib.import_module(WANDB)
        path = directory / ID_FILE
        if not path.exists():
            write_whole(path, uuid.uuid4().hex)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", f"{Path(options['out']).name} {label}"),
                id=path.read_text(),
                resume="allow",
                dir=str(directory),
                config={**options, "optimizer": label},
                reinit="create_new",  # --compare's second run is one of its own
            )
        except Exception as error:  # not logged in, no network
            raise UserError(
                f"--log-to {WANDB}: W&B refuses ({error}); `wandb login`, WANDB_MODE=offline, or --resume without it",
                status=1,
            ) from None

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def flush(self) -> None:  # a process of its own writes
        pass

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
