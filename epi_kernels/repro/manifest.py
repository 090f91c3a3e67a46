"""One manifest a run: what it was, what made it, what came out. Tables read nothing else."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict

from epi_kernels.repro.config import Strict
from epi_kernels.repro.runs import Run

PLAIN = "plain_template"  # in the notes of a checkpoint's base run: its tokenizer has no chat template


class Bytes(Strict):
    """Memory of the stage, in bytes; of a run of several stages, the most that one of them took."""

    parameters: int  # elements, not bytes
    weights: int
    optimizer: dict[str, int]  # state by kind, and "total"
    peak: int | None = (
        None  # of the device, or of the process on a CPU, from before its model was loaded to its end
    )
    peak_of: str = "process"  # or "device"
    before: int | None = None  # held when that began, by what is not the run's; None: not known


class StepTime(Strict):
    """Milliseconds of one optimizer step and of one whole training step; of a run of several stages, the stages' means
    weighted by their steps."""

    optimizer_p20: float
    optimizer_p50: float
    optimizer_p80: float
    training_p50: float
    steps: int


class Manifest(Strict):
    """Of a finished run. What diverged has losses that are no numbers: they are written, and read back, as such."""

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="constants")

    key: str
    run: Run
    seed: int
    commit: str | None
    dirty: bool | None = None  # whether the package was not as committed; None: not in a repository
    versions: dict[str, str]
    machine: dict[str, Any]
    finished: str  # ISO 8601, UTC
    seconds: float
    scores: dict[str, float]  # kind of task -> score of the model after the run, in the task's own unit
    losses: dict[str, float] = {}  # kind of task -> held-out loss, nats a token of the answer
    bytes: Bytes | None = None
    time: StepTime | None = None
    series: dict[str, Any] = {}  # of the observers, by their names: plain JSON
    hub: dict[
        str, str
    ] = {}  # what came from the hub: name or NAME@REVISION -> the commit's hash, where it was told
    notes: dict[str, Any] = {}  # groups of CPI-FT, examples cut, ...

    @property
    def source(self) -> str:
        """The commit, for people, with a word on what was not committed."""
        return (self.commit or "unknown")[:10] + (" with uncommitted changes" if self.dirty else "")
