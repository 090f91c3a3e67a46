"""Runs in slices: what is done is kept, what never ends is tried once more and then a row that says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import slices
from bench.slices import Kept, Slice, allowed, run_slices
from python_tests.harness import ROOT


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "state.tmp")


def line(result: dict) -> str:
    return str(result)


def test_slices_resume_and_stop_in_time(kept: Kept):
    calls = []

    def piece(name: str, seconds: float = 1.0) -> Slice:
        return Slice(name, seconds, lambda _: calls.append(name) or {"value": name})

    pieces = [piece("a"), piece("b", 1e9), piece("c")]
    assert run_slices(pieces, kept, 100.0, line) == 2  # b may not fit what is left
    assert run_slices(pieces, kept, 0.0, line) == 2
    assert run_slices(pieces, kept, 100.0, line) == 0  # the first of a call always runs
    assert run_slices(pieces, Kept(kept.path), None, line) == 0
    assert calls == ["a", "b", "c"] and set(kept.done) == {"a", "b", "c"} and not kept.started


def test_a_slice_that_raises_is_recorded_and_the_rest_runs(kept: Kept):
    def fails(_: float):
        raise RuntimeError("out of memory")

    left = run_slices([Slice("x", 1, fails), Slice("y", 1, lambda _: {})], kept, None, line)
    assert left == 0 and "out of memory" in kept.done["x"]["error"] and "error" not in kept.done["y"]


KILLED = """
import os, sys
from pathlib import Path
from bench.slices import Kept, Slice, run_slices

kept = Kept(Path(sys.argv[1]))
pieces = [Slice("good", 1, lambda _: {}), Slice("bad", 1, lambda _: os._exit(9)), Slice("last", 1, lambda _: {})]
run_slices(pieces, kept, None, str)
"""


def test_a_slice_that_takes_the_process_with_it_does_so_twice_and_no_more(tmp_path: Path):
    state = tmp_path / "state.tmp"
    for expected in (9, 9, 0):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(state)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == expected, done.stderr
    kept = Kept(state)
    assert set(kept.done) == {"good", "bad", "last"} and "error" not in kept.done["last"]
    error = kept.done["bad"]["error"]
    assert error.startswith("begun 2 times and never finished: begun 2")
    assert error.count("ended with its process") == 2


def test_a_slice_that_is_stopped_for_time_is_tried_once_more(kept: Kept, capsys):
    given = []

    def hangs(seconds: float):
        given.append(seconds)
        raise subprocess.TimeoutExpired("hangs", seconds)

    pieces = [Slice("hangs", 10.0, hangs), Slice("good", 1, lambda _: {"fine": 1})]
    assert run_slices(pieces, kept, None, line) == 0
    assert given == [10.0 * slices.PATIENCE] * 2
    assert (
        kept.done["hangs"]["error"]
        == "begun 2 times and never finished: stopped after 40 s; stopped after 40 s"
    )
    assert "fine" in kept.done["good"] and "stopped after 40 s" in capsys.readouterr().out
    assert json.loads(kept.path.read_text())["started"] == {}


def test_a_slice_that_ends_at_its_second_try_is_a_result(kept: Kept):
    tries = []

    def slow_at_first(seconds: float):
        tries.append(seconds)
        if len(tries) == 1:
            raise subprocess.TimeoutExpired("slow", seconds)
        return {"fine": 1}

    assert run_slices([Slice("slow", 5.0, slow_at_first)], kept, None, line) == 0
    assert kept.done["slow"]["fine"] == 1 and "error" not in kept.done["slow"]


def test_an_interruption_is_no_attempt(kept: Kept):
    def interrupted(_: float):
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run_slices([Slice("x", 1, interrupted)], kept, None, line)
    assert not kept.started and not kept.done


def test_the_time_of_a_slice_fits_what_the_limit_leaves():
    piece = Slice("x", 100.0, lambda _: {})
    assert allowed(piece, None) == 400.0
    assert allowed(piece, 540.0) == 400.0 and allowed(piece, 250.0) == 250.0
    assert allowed(piece, 1.0) == 100.0, "the first of a call has its guess at least"
