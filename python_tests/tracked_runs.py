"""What a run told TensorBoard and W&B: by its event files; by W&B itself, offline, where it is installed, and by a module
in its place."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from epi_kernels.finetune.log import scalars
from python_tests.finetune_runs import events

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
    """Every row of the runs that W&B wrote below `folder`; its own process may still be writing them."""
    rows = []
    for path in sorted(folder.rglob("run-*.wandb")):
        for record in _ended_run(path):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append(
                    {one.key or ".".join(one.nested_key): json.loads(one.value_json) for one in items}
                )
    return rows


def _ended_run(path: Path, timeout_s: float = 60) -> list:
    """Its records, once the last of them is there."""
    from wandb.proto.wandb_internal_pb2 import Record

    end = time.monotonic() + timeout_s
    while True:
        records = [Record.FromString(data) for data in _records(path.read_bytes())]
        if any(one.WhichOneof("record_type") == "exit" for one in records):
            return records
        assert time.monotonic() < end, f"{path} has no end"
        time.sleep(0.1)


def _records(content: bytes) -> Iterator[bytes]:
    """LevelDB's log format after a header of 7 bytes: crc32, length, and whether it is whole (1), begins, goes on or ends (4)."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        left = BLOCK - at % BLOCK
        if left < 7:  # no header fits: padding
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if kind == 0 or at + 7 + length > len(content):  # not written yet
            return
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


def of_the_log(out) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for kind in ("step", "refresh", "eval"):
        for event in events(out, kind):
            for name, value in scalars(event).items():
                found.setdefault(name, {})[event["step"]] = value
    return found


def of_tensorboard(out) -> dict[str, dict[int, float]]:
    found = EventAccumulator(str(out / "tensorboard")).Reload()
    read = {tag: found.Scalars(tag) for tag in found.Tags()["scalars"]}
    for tag, points in read.items():
        assert len({point.step for point in points}) == len(points), f"{tag}: a step is there twice"
    return {tag: {point.step: point.value for point in points} for tag, points in read.items()}


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, points in wanted.items():
        assert found[name] == {step: pytest.approx(value) for step, value in points.items()}, name
