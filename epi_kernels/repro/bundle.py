"""A finished sweep as one small JSON file that is committed: what the README's tables are written from.

    {"schema": 1, "preset": {...}, "tables": [names],
     "origins": [{"commit", "versions", "machine"}],     stated once for all runs that share them
     "parts": [{...}],                                    of the runs' descriptions; {"$": 3} elsewhere stands for parts[3]
     "manifests": [{...}]}                                one a run, with "origin": an index, and the run in parts

Runs contain the runs they start from, so written out in full each would repeat the same recipes and models.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from epi_kernels.files import write_whole
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.manifest import Manifest
from epi_kernels.repro.preset import Preset
from epi_kernels.repro.runs import key

SCHEMA = 1
DIGITS = 6  # significant, of the numbers in series; scores, bytes and times are kept as they are
ORIGIN = ("commit", "versions", "machine")


@dataclass(frozen=True)
class Bundle:
    preset: Preset
    tables: tuple[str, ...]  # that were asked for
    manifests: dict[
        str, Manifest
    ]  # by runs.key as it is now: a field that a description got since has its default


def bundle(
    preset: Preset,
    tables: Sequence[str],
    manifests: Mapping[str, Manifest],
    series: Collection[str] | None = None,
) -> dict[str, Any]:
    """Plain JSON. ``manifests``: those that the tables need. ``series``: names of those to keep; None: all."""
    origins, parts = _Pool(), _Pool()
    rows = []
    for manifest in manifests.values():
        row = manifest.model_dump(mode="json")
        row["origin"] = origins.place({name: row.pop(name) for name in ORIGIN})
        row["run"] = _shared(row["run"], parts)
        row["series"] = {
            name: _rounded(value) for name, value in row["series"].items() if series is None or name in series
        }
        rows.append(row)
    return {
        "schema": SCHEMA,
        "preset": preset.model_dump(mode="json"),
        "tables": list(tables),
        "origins": origins.entries,
        "parts": parts.entries,
        "manifests": rows,
    }


def unbundle(data: Mapping[str, Any]) -> Bundle:
    """Raises ReproError when another version wrote it."""
    try:
        if data["schema"] != SCHEMA:
            raise ReproError(f"it has schema {data['schema']}, this version reads {SCHEMA}")
        found: dict[str, Manifest] = {}
        for row in data["manifests"]:
            row = {name: value for name, value in row.items() if name != "origin"} | data["origins"][
                row["origin"]
            ]
            manifest = Manifest.model_validate(row | {"run": _whole(row["run"], data["parts"])})
            found[key(manifest.run)] = manifest
        return Bundle(Preset.model_validate(data["preset"]), tuple(data["tables"]), found)
    except (KeyError, IndexError, TypeError, ValidationError) as error:
        wrong = str(error).splitlines()[0]
        raise ReproError(
            f"it does not hold what this version reads ({type(error).__name__}: {wrong})"
        ) from None


def write_bundle(data: Mapping[str, Any], path: Path) -> Path:
    """A line an entry, so that a change shows as one. OSError."""
    lines = []
    for name, value in data.items():
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(_compact(one) for one in value) + "\n]"
        else:
            text = _compact(value)
        lines.append(f"{json.dumps(name)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def read_bundle(path: Path) -> Bundle:
    """Raises ReproError, with the file's name, and OSError."""
    try:
        return unbundle(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ReproError(f"{path}: is not JSON ({error})") from None
    except ReproError as error:
        raise ReproError(f"{path}: {error}") from None


def digest(path: Path) -> str:
    """Of a bundle's file: what is drawn from it is out of date when this changes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


class _Pool:
    """Values, each once. They are told apart by their JSON: 1, 1.0 and True are three."""

    def __init__(self) -> None:
        self.entries: list[Any] = []
        self._places: dict[str, int] = {}

    def place(self, value: Any) -> int:
        place = self._places.setdefault(_compact(value), len(self.entries))
        if place == len(self.entries):
            self.entries.append(value)
        return place


def _shared(value: Any, parts: _Pool) -> Any:
    """With every object inside, and itself, moved to the parts."""
    if isinstance(value, dict):
        inner = {name: _shared(one, parts) for name, one in value.items()}
        return {"$": parts.place(inner)}
    return [_shared(one, parts) for one in value] if isinstance(value, list) else value


def _whole(value: Any, parts: Sequence[Any]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"$"}:
            return _whole(parts[value["$"]], parts)
        return {name: _whole(one, parts) for name, one in value.items()}
    return [_whole(one, parts) for one in value] if isinstance(value, list) else value


def _rounded(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
