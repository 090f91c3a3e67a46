"""SIGKILL at random moments, again and again: what is on the disk stays whole, and the end has the undisturbed bits."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file

from epi_kernels.finetune import checkpoint
from python_tests.fork_server import Server, serving
from python_tests.stopped_runs import STEPS, arguments, assert_same_end, story, write_inputs
from python_tests.tracked_runs import assert_same, of_tensorboard, of_the_log

SEED = 20261
STARTING, STEPPING = "starting", "between checkpoints"
WRITING, ENDING = "writing a checkpoint", "putting the model in place"
PHASES = {STARTING, STEPPING, WRITING}


def written(out: Path) -> dict[str, int]:
    """When the log and the directories of unfinished checkpoints last changed."""
    found = {}
    for path in [out / "log.jsonl", *out.glob("checkpoints/.partial-*")]:
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            found[path.name] = path.stat().st_mtime_ns
    return found


def phase(out: Path, before: dict[str, int]) -> str:
    """What a run was doing when it was killed, from what lies on the disk and did not when it began."""
    new = {name for name, when in written(out).items() if before.get(name) != when}
    if "log.jsonl" not in new:
        return STARTING
    if len(new) > 1:
        return WRITING
    return ENDING if last_whole_step(out) == STEPS else STEPPING


def last_whole_step(out: Path) -> int:
    """0 without a checkpoint; every one that a resume would take loads."""
    steps = [0]
    for path in checkpoint.list_checkpoints(out):
        steps.append(checkpoint.load_state(path)["step"])
        assert path.name == f"{checkpoint.PREFIX}{steps[-1]:08d}"
        assert checkpoint.load_optimizer(path)["optimizer"]["state"]
        assert load_file(path / "model.safetensors")
    return steps[-1]


def step_before_the_last_begun(out: Path) -> int:
    """The log has a line for each checkpoint before it is written: all but the last of those must be whole."""
    path = out / "log.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    events = [json.loads(line) for line in lines]
    begun = [event["step"] for event in events if event["event"] == "checkpoint"]
    return begun[-2] if len(begun) > 1 else 0


class Killer:
    """Runs the command over and over, each time killed at a random moment, until it ends by itself."""

    def __init__(self, server: Server, output: Path, life_s: float, kills: int, phases: set[str]):
        self.server, self.random, self.life_s = server, random.Random(SEED), life_s
        self.output, self.wanted, self.phases = output, kills, phases
        self.kills: Counter[str] = Counter()
        self.progressed = 0  # kills that found a later checkpoint than the kill before, yet not the last

    def satisfied(self) -> bool:
        enough = self.kills.total() >= self.wanted and self.kills.keys() >= self.phases
        return enough and self.progressed >= len(self.phases)

    def _wait(self, out: Path, before: dict[str, int]) -> str:
        """Returns at a random moment: of a whole life, a little after a line of the log, or around the writing of a
        checkpoint; or at the end of the run. Says which."""
        kind = self.random.choice(["start", "log", "checkpoint"])
        share = self.random.random()
        if kind == "start":
            count, delay_s = 0, share * self.life_s
        else:
            count, delay_s = self.random.randint(1, 12 if kind == "log" else 3), share * self.life_s / 20
        if count:
            self._wait_for(out, kind, count, before)
        end = time.perf_counter() + delay_s
        while time.perf_counter() < end and not (out / "done.json").exists():
            time.sleep(0.0005)
        return f"{delay_s * 1000:.0f} ms after {kind} {count}"

    def _wait_for(self, out: Path, kind: str, count: int, before: dict[str, int]) -> None:
        """Until the log has been written to `count` times, or as many checkpoints have been begun."""

        def events() -> set:
            now = written(out)
            log = now.pop("log.jsonl", None)
            return {log} if kind == "log" else {name for name in now if checkpoint.PREFIX in name}

        known = events() | ({before.get("log.jsonl")} if kind == "log" else set(before))
        enough, end = len(known) + count, time.perf_counter() + 60
        while len(known) < enough and not (out / "done.json").exists():
            assert time.perf_counter() < end, f"no {kind} {count}: {self.output.read_text()[-2000:]}"
            known |= events()
            time.sleep(0.0005)

    def drive(self, begin: list, out: Path) -> None:
        """`begin`: the arguments of a run that begins anew in `out`."""
        reached = 0
        while True:
            resumable, done = (out / "run.json").exists(), (out / "done.json").exists()
            before = written(out)
            process = self.server.start(["finetune", "--out", out, "--resume"] if resumable else begin)
            when = "at no time"
            if not done:
                when = self._wait(out, before)
                os.kill(process, signal.SIGKILL)
            status = self.server.wait()
            step = last_whole_step(out)
            assert step >= max(reached, step_before_the_last_begun(out)), (
                "a checkpoint that was whole is gone"
            )
            if status != -signal.SIGKILL:
                print(f"ended with {status}; was to be killed {when}")
                assert status == 0, self.output.read_text()[-2000:]
                return
            doing = phase(out, before)
            print(f"killed {when}, {doing}; whole: step {step}")
            self.kills[doing] += 1
            self.progressed += reached < step < STEPS
            reached = step


class Undisturbed(NamedTuple):
    """A run that nobody killed, and what it takes to begin another one."""

    server: Server
    output: Path
    files: Path
    out: Path
    life_s: float


MORE = ["--checkpoint-every", 2, "--keep-checkpoints", 1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Iterator[Undisturbed]:
    folder = tmp_path_factory.mktemp("undisturbed")
    files, out, output = folder / "inputs", folder / "out", folder / "output.txt"
    files.mkdir()
    write_inputs(files)
    with open(output, "wb") as file, serving(file) as server:
        life_s = 0.0
        for _ in range(2):  # the first one imports what is imported late
            began = time.perf_counter()
            server.start(["finetune", *arguments(files, out, *MORE, "--overwrite")])
            assert server.wait() == 0, output.read_text()[-2000:]
            life_s = time.perf_counter() - began
        yield Undisturbed(server, output, files, out, life_s)


def kill_and_compare(undisturbed: Undisturbed, folder: Path, kills: int, phases: set[str], *more) -> None:
    killer = Killer(undisturbed.server, undisturbed.output, undisturbed.life_s, kills, phases)
    runs = 0
    while runs < 100 and not killer.satisfied():
        out = folder / f"out-{runs}"
        runs += 1
        killer.drive(["finetune", *arguments(undisturbed.files, out, *MORE, *more)], out)
        assert_same_end(out, undisturbed.out)
        assert story(out) == story(undisturbed.out)
        assert (out / "done.json").read_bytes() == (undisturbed.out / "done.json").read_bytes()
        names = [
            sorted(path.name for path in one.rglob("*") if "tfevents" not in path.name)
            for one in (out, undisturbed.out)
        ]
        assert names[0] == names[1]  # event files are named by their time
        assert_same(of_tensorboard(out), of_the_log(out))
    print(f"seed {SEED}: {killer.kills.total()} kills in {runs} runs: {dict(killer.kills)}")
    assert killer.satisfied(), (killer.kills, killer.progressed)


@pytest.mark.timeout(300)
def test_twenty_kills_at_random_moments_leave_no_trace(undisturbed, tmp_path):
    kill_and_compare(undisturbed, tmp_path, 20, PHASES)


@pytest.mark.timeout(300)
def test_kills_of_an_offloaded_run_leave_no_trace(undisturbed, tmp_path):
    """Stepped during the backward pass, beside a run that was not offloaded."""
    resident, released = tmp_path / "resident", ("--gradient-release", "--max-grad-norm", 0)
    undisturbed.server.start(["finetune", *arguments(undisturbed.files, resident, *MORE, *released)])
    assert undisturbed.server.wait() == 0, undisturbed.output.read_text()[-2000:]
    beside = undisturbed._replace(out=resident)
    kill_and_compare(beside, tmp_path, 4, {STEPPING}, *released, "--offload", "cpu")
    for run in tmp_path.glob("out-*/run.json"):
        options = json.loads(run.read_text())["options"]
        assert options["offload"] == "cpu" and options["gradient_release"]
