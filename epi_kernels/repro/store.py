"""Where runs lie: one folder a run, whole or absent, under the run's key.

RUNS/KEY/            manifest.json
                     model.safetensors, config.json, tokenizer: only of runs that others start from
                     isolation.safetensors: importance and masks, where the optimizer was a MaskedEMAAdamW
RUNS/KEY.progress    a run that was stopped and goes on from there
RUNS/KEY.fused       a fusion whose scores are not there yet
RUNS/KEY.isolation   the same of a sharded run's isolation.safetensors
RUNS/KEY.lock        a run under way
RUNS/contents.json   digests of the local files that were read
RUNS/lock            held while a sweep is at work
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from epi_kernels.finetune.checkpoint import write_directory
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.manifest import Manifest
from epi_kernels.repro.runs import Run, key

MANIFEST, ISOLATION = "manifest.json", "isolation.safetensors"
CONFIG = "config.json"  # of the weights; where it is they are whole


class Store:
    """A folder of finished runs. Cheap to make; workers make their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def at(self, run: Run) -> Path:
        return self.folder / key(run)

    def progress(self, run: Run) -> Path:
        return self.folder / f"{key(run)}.progress"

    def manifest(self, run: Run) -> Manifest | None:
        """None where the run is not finished. Raises ReproError when its manifest cannot be read."""
        return self.manifest_of(key(run))

    def manifest_of(self, name: str) -> Manifest | None:
        """The same by the run's key."""
        path = self.folder / name / MANIFEST
        try:
            found = Manifest.model_validate_json(path.read_bytes())
            if found.key != name:
                raise ReproError(f"{path}: is of the run {found.key}; remove {path.parent}")
            return found
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise ReproError(
                f"{path}: is no manifest of this version ({error}); remove {path.parent}"
            ) from None

    def weights(self, run: Run) -> Path:
        """The folder that holds the model after a run. A checkpoint is copied there as it was loaded: cores are taken from
        what training began with, in its dtype and by its names."""
        return self.at(run)

    def finished(self, run: Run, *, with_weights: bool) -> bool:
        """Whether nothing is left to do: a run made as a leaf has no weights for others to start from."""
        if not (self.at(run) / MANIFEST).is_file():
            return False
        weights = self.weights(run)
        return not with_weights or ((weights / CONFIG).is_file() and any(weights.glob("*.safetensors")))

    def write(self, run: Run, manifest: Manifest, write_model: Callable[[Path], None] | None) -> None:
        """The folder of a finished run, whole or not at all; then its progress is gone. Raises DiskFull."""

        def write(folder: Path) -> None:
            if write_model is not None:
                write_model(folder)
            (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")

        write_directory(self.at(run), write)
        self.progress(run).unlink(missing_ok=True)

    def drop_weights(self, run: Run) -> None:
        """What others would start from; the manifest stays, and a run that needs the weights again makes them again."""
        (self.at(run) / CONFIG).unlink(missing_ok=True)  # first: killed midway, what is left is no model
        for path in self.at(run).glob("*.safetensors"):
            path.unlink()

    @contextlib.contextmanager
    def claim(self, run: Run) -> Iterator[None]:
        """Makes others that want the same run wait; they find it finished."""
        path = self.folder / f"{key(run)}.lock"
        while True:
            with open(path, "w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_at(file, path):
                    continue  # who held it has removed it: the next one holds another file
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One sweep at a time. Raises ReproError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            opened = open(self.folder / "lock", "w")
        except OSError as error:
            raise ReproError(f"{self.folder}: cannot be written ({error})") from None
        with opened as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ReproError(
                    f"{self.folder}: another sweep is at work there; wait for it, or pass another --out"
                ) from None
            yield


def _is_at(file: IO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
