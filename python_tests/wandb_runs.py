"""What W&B was told: by W&B itself, offline, where it is installed; by a module in its place."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

BLOCK = 32768  # bytes


class Recorder(ModuleType):
    """Stands in `sys.modules` for W&B: keeps the runs it is asked for, and what they are told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.runs: list[RecordedRun] = []

    def init(self, **given) -> RecordedRun:
        self.runs.append(RecordedRun(given))
        return self.runs[-1]


class RecordedRun:
    def __init__(self, given: dict) -> None:
        self.given, self.exit_code = given, None
        self.rows: list[dict] = []

    def log(self, values: dict, step: int) -> None:
        assert self.exit_code is None
        self.rows.append({"_step": step, **values})

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def recording(monkeypatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    return recorder


def offline_rows(folder: Path) -> list[dict]:
    """Every row of the runs that W&B wrote below `folder`."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted(folder.rglob("run-*.wandb")):
        for data in _records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append(
                    {one.key or ".".join(one.nested_key): json.loads(one.value_json) for one in items}
                )
                rows[-1].setdefault("_step", record.history.step.num)
    return rows


def _records(content: bytes) -> Iterator[bytes]:
    """LevelDB's log format after a header of 7 bytes: crc32, length, and whether it is whole (1), begins, goes on or ends (4)."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        left = BLOCK - at % BLOCK
        if left < 7:  # no header fits: padding
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def curves(rows: list[dict]) -> dict[str, dict[int, float]]:
    """By name and step; a value that is there twice is a fault."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if "/" in name:
                assert row["_step"] not in found.setdefault(name, {}), (name, row)
                found[name][row["_step"]] = value
    return found
