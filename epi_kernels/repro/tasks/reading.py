"""Original files of data sets as records with their places; what is wrong is named by file, line and field."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from epi_kernels.finetune.data import LineError, first_of, lines_of, text_field
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.hub import COMMITS, HASH

Record = tuple[
    str, Any
]  # "FILE:LINE" and what stands there; a LineError where that is nothing a format knows


@dataclass(frozen=True)
class Hub:
    """Where a data set lies on the hub. `revision` is the parquet branch where the main one still holds a script."""

    name: str
    train: str = "train"
    test: str | None = "test"  # None: it has none
    config: str | None = None
    revision: str | None = None


class Dropped(Exception):
    """A record that the original papers leave out, too: counted under this text, not an error."""


def pick(record: Any, *names: str) -> Any:
    """The value under the first of `names` that is there: one field as several releases call it. Raises LineError."""
    if not isinstance(record, dict):
        raise LineError(f"is a JSON {type(record).__name__}, not an object")
    for name in names:
        if record.get(name) is not None:
            return record[name]
    wanted = " or ".join(f'"{name}"' for name in names)
    have = ", ".join(f'"{key}"' for key in list(record)[:8]) or "none"
    raise LineError(f"has no {wanted} (its fields: {have})")


def pick_text(record: Any, *names: str, allow_empty: bool = False) -> str:
    """As `pick`, of a string."""
    pick(record, *names)
    name = next(name for name in names if record.get(name) is not None)
    return text_field(record, name, allow_empty)


def find(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Files of the first pattern that fits any, case ignored (train_*.jsonl, say)."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for pattern in patterns:
        if found := [path for path in files if fnmatch(path.name.lower(), pattern.lower())]:
            return found
    return []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ReproError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ReproError(f"{path}: is not UTF-8 (byte {error.start})") from None


def json_records(path: Path) -> Iterator[Record]:
    """Of JSON lines, or of one JSON array (its places are then "FILE[N]", counted from 1)."""
    first = True
    for number, line in lines_of(path, ReproError):
        if first and isinstance(line, str) and line.startswith("["):
            yield from _array(path)
            return
        first = first and not line
        if isinstance(line, LineError):
            yield f"{path}:{number}", line
        elif line:
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"{path}:{number}", LineError(f"is not JSON ({error})")


def _array(path: Path) -> Iterator[Record]:
    try:
        array = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ReproError(f"{path}: is not JSON ({error})") from None
    yield from ((f"{path}[{number}]", record) for number, record in enumerate(array, 1))


def csv_records(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Of a CSV with exactly these columns; a first line that names columns is passed over."""
    reader = csv.reader(io.StringIO(_text(path), newline=""))
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield place, LineError(f"is not CSV ({error})")
            continue
        if row is None:
            return
        if not row or (reader.line_num == 1 and re.match(r"class\b", row[0], re.IGNORECASE)):
            continue
        if len(row) != len(columns):
            yield (
                place,
                LineError(
                    f"has {len(row)} columns, not the {len(columns)} of the format: {', '.join(columns)}"
                ),
            )
        else:
            yield place, dict(zip(columns, row))


def column_records(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Of a CoNLL file: one token a line, sentences parted by blank lines. A record has a list for each of `columns`,
    which stand for the first columns but one, and the last (the tag)."""
    sentence: dict[str, list[str]] = {column: [] for column in columns}
    first, wrong = 0, None
    for number, line in enumerate([*_text(path).split("\n"), ""], 1):
        fields = line.split()
        if fields and fields[0] == "-DOCSTART-":
            continue
        if fields:
            first = first or number
            if len(fields) < len(columns) and wrong is None:
                wrong = (
                    f"{path}:{number}",
                    LineError(f"has no {columns[-1]} column: one token a line, its tag last"),
                )
            for column, value in zip(columns, [*fields[: len(columns) - 1], fields[-1]]):
                sentence[column].append(value)
        elif first:
            yield wrong or (f"{path}:{first}", sentence)
            sentence, first, wrong = {column: [] for column in columns}, 0, None


def block_records(path: Path, names: Sequence[str]) -> Iterator[Record]:
    """Of a file of blocks of as many lines as `names`, parted by blank lines, or of JSON lines under the same name."""
    text = _text(path)
    if text.lstrip().startswith(("{", "[")):
        yield from json_records(path)
        return
    block: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            block.append(line.strip())
        elif block:
            place = f"{path}:{number - len(block)}"
            if len(block) == len(names):
                yield place, dict(zip(names, block))
            else:
                yield (
                    place,
                    LineError(f"is a block of {len(block)} lines, not {len(names)}: {', '.join(names)}"),
                )
            block = []


def hub_records(hub: Hub, split: str, kind: str, expects: str) -> Iterator[Record]:
    """Of the hub, through the `datasets` package; its cache serves without a network. Raises ReproError."""
    local = f"give `source`, a folder with {expects}"
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise ReproError(
            f"task {kind}: reading {hub.name} from the hub needs the package datasets (pip install datasets); or {local}"
        ) from None
    try:
        rows = datasets.load_dataset(hub.name, hub.config, split=split, revision=hub.revision)
    except Exception as error:  # whatever hub, network and file system raise
        reason = " ".join(str(error).split())[:200]
        raise ReproError(
            f"task {kind}: {hub.name} (split {split}) could not be read, neither from the hub nor from its cache "
            f"({type(error).__name__}: {reason}); without a network, {local}"
        ) from None
    if commit := _commit_of(rows, hub.name):
        COMMITS[hub.name, hub.revision] = commit
    for number, row in enumerate(rows, 1):
        yield f"{hub.name}[{split}]:{number}", row


def _commit_of(rows: Any, name: str) -> str | None:
    """Which the files came from: `datasets` keeps their addresses, hf://datasets/NAME@HASH/PATH."""
    addresses = getattr(rows, "download_checksums", None) or {}
    found = {
        match[1] for one in addresses if (match := re.search(rf"{re.escape(name)}@({HASH.pattern})/", one))
    }
    return found.pop() if len(found) == 1 else None


def parsed(
    records: Iterator[Record], parse: Callable[[Any, str], Any], expects: str
) -> tuple[list, dict[str, int]]:
    """(what `parse` makes of the records, how many were dropped by reason). Raises ReproError with the first wrong ones."""
    good, dropped, errors = [], {}, []
    for place, record in records:
        try:
            if isinstance(record, LineError):
                raise record
            good.append(parse(record, place))
        except Dropped as reason:
            dropped[str(reason)] = dropped.get(str(reason), 0) + 1
        except LineError as error:
            errors.append(f"{place}: {error}")
    if errors:
        raise ReproError(f"{first_of(errors)}\nexpected: {expects}")
    return good, dropped
