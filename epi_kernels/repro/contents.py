"""Digests of the local files that runs read, so that a run's key changes with what lies in a folder and not with its
path alone. What comes from the hub goes by its name and `revision`, synthetic data by the code.

A file is hashed once: RUNS/contents.json keeps its digest by path, size and time of change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from epi_kernels.files import write_whole
from epi_kernels.repro.config import ModelSpec, TaskSpec
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.hub import CHECKPOINT_FILES, OTHER_FORMATS, TOKENIZER_FILES
from epi_kernels.repro.pins import refuse_revision_of_a_folder
from epi_kernels.repro.runs import CpiFt, Run, Train, base_of
from epi_kernels.repro.tasks import local_files

if TYPE_CHECKING:
    from epi_kernels.repro.preset import Preset

CACHE = "contents.json"
TOLD = 1 << 30  # bytes to hash from which on it is said: sha256 takes a second for one or two of them
PIECE = 1 << 22  # bytes read at once
DIGITS = 16

Spec = TypeVar("Spec", ModelSpec, TaskSpec)
Contents = dict[str, str]  # what reads the files -> digest


def files_of(spec: ModelSpec | TaskSpec) -> list[Path]:
    """Those on this machine's disk that a run reads; none of what comes from the hub or from code."""
    if isinstance(spec, TaskSpec):
        return local_files(spec)
    weights = _folder(spec.checkpoint, (*CHECKPOINT_FILES, "*.bin"))  # an older format that loads, too
    tokenizer = _folder(spec.tokenizer, TOKENIZER_FILES)
    return [*weights, *tokenizer]


def _folder(name: str | None, patterns: Sequence[str]) -> list[Path]:
    folder = Path(name).expanduser() if name is not None else None
    if folder is None or not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and any(fnmatch(path.name, one) for one in patterns)
        and not any(fnmatch(path.name, one) for one in OTHER_FORMATS)
    )


class Digests:
    """Of files, as remembered in a folder of runs. `keep`: what is hashed is remembered, where that can be written."""

    def __init__(self, runs: Path, *, keep: bool) -> None:
        self._path, self._keep = runs / CACHE, keep
        self._known: dict[str, list] = {}
        with contextlib.suppress(OSError, ValueError):  # there is none yet, or it was cut off: hash anew
            self._known = json.loads(self._path.read_text(encoding="utf-8"))

    def unknown(self, paths: Iterable[Path]) -> int:
        """Bytes that are still to be hashed."""
        return sum(path.stat().st_size for path in set(paths) if not self._is_known(path))

    def of(self, paths: Sequence[Path]) -> str | None:
        """Of names and contents, wherever the folder lies; None of no files. OSError."""
        if not paths:
            return None
        rows = [[path.name, self._file(path)] for path in paths]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:DIGITS]

    def _is_known(self, path: Path) -> bool:
        return self._known.get(str(path.resolve()), [])[:2] == _stamp(path)

    def _file(self, path: Path) -> str:
        if not self._is_known(path):
            stamp = _stamp(path)  # taken before: a file that changes meanwhile is hashed again
            with path.open("rb") as file:
                digest = hashlib.sha256()
                while piece := file.read(PIECE):
                    digest.update(piece)
            self._known[str(path.resolve())] = [*stamp, digest.hexdigest()]
            if self._keep:
                self._write()
        return self._known[str(path.resolve())][2]

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # then it is hashed again next time
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(self._known))


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def contents(preset: Preset, runs: Path) -> Contents:
    """Of all that a preset reads from local folders. Raises ReproError."""
    digests = Digests(runs, keep=True)
    specs = specs_of(preset)
    for spec in specs:
        refuse_revision_of_a_folder(spec)
    with _readable():
        files = {_name(spec): files_of(spec) for spec in specs}
        left = digests.unknown(path for paths in files.values() for path in paths)
        if left > TOLD:
            print(f"hashing {left / TOLD:.0f} GiB of local data and checkpoints, once", flush=True)
        found = {name: digests.of(paths) for name, paths in files.items()}
    return {name: digest for name, digest in found.items() if digest is not None}


def with_contents(preset: Preset, found: Mapping[str, str]) -> Preset:
    """The preset whose specs say what lies in their folders. Raises ReproError where one says something else."""
    settings = {
        place: setting.model_copy(update=_stamped(setting, found))
        for place in ("low_resource", "vision")
        if (setting := getattr(preset, place)) is not None
    }
    return preset.model_copy(update=_stamped(preset, found) | settings)


def refuse_changed(run: Run, runs: Path) -> None:
    """Raises ReproError where files that a run reads are no longer those of its description."""
    digests = Digests(runs, keep=False)  # several processes ask
    tasks = run.tasks if isinstance(run, Train | CpiFt) else ()
    with _readable():
        for spec in [*dict.fromkeys([*tasks, *run.evaluate]), base_of(run).model]:
            if spec.contents is not None and digests.of(files_of(spec)) != spec.contents:
                raise ReproError(
                    f"{_where(spec)}: its files are no longer those that the runs were planned with; run the same"
                    " command again: what was made of the others is kept, and is made anew of these"
                )


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ReproError(f"{error.filename}: cannot be read ({error.strerror})") from None


def specs_of(preset: Preset) -> list[ModelSpec | TaskSpec]:
    """Every model and task of a preset and its settings."""
    places = [preset, *(one for one in (preset.low_resource, preset.vision) if one is not None)]
    return [
        spec for place in places for group in (place.models, place.tasks) for spec in (group or {}).values()
    ]


def _stamped(place: object, found: Mapping[str, str]) -> dict[str, dict]:
    """The models and tasks of a preset or a setting."""
    groups = {name: getattr(place, name) for name in ("models", "tasks")}
    return {
        name: {one: _with(spec, found.get(_name(spec))) for one, spec in group.items()}
        for name, group in groups.items()
        if group is not None
    }


def _with(spec: Spec, digest: str | None) -> Spec:
    if spec.contents is not None and digest != spec.contents:
        raise ReproError(
            f"{_where(spec)}: its files have digest {digest}, the preset's `contents` says {spec.contents}"
        )
    return spec.model_copy(update={"contents": digest})


def _where(spec: ModelSpec | TaskSpec) -> str:
    return f"task {spec.kind}, {spec.source}" if isinstance(spec, TaskSpec) else f"model {spec.checkpoint}"


def _name(spec: ModelSpec | TaskSpec) -> str:
    """What tells apart whose files are others."""
    parts = (spec.kind, spec.source) if isinstance(spec, TaskSpec) else (spec.checkpoint, spec.tokenizer)
    return json.dumps([type(spec).__name__, *parts])
