"""SIGKILL at random moments, again and again: what is on the disk stays whole, and the end has the undisturbed bits."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from epi_kernels.finetune import checkpoint
from python_tests.fork_server import serving
from python_tests.stopped_runs import STEPS, arguments, assert_same_end, story, write_inputs

KILLS = 20
SEED = 20261
STARTING, STEPPING = "starting", "between checkpoints"
WRITING, ENDING = "writing a checkpoint", "putting the model in place"
NEEDED = {STARTING, STEPPING, WRITING}


def written(out: Path) -> dict[str, int]:
    """When the log and the directories of unfinished checkpoints last changed."""
    found = [out / "log.jsonl", *out.glob("checkpoints/.partial-*")]
    return {path.name: path.stat().st_mtime_ns for path in found if path.exists()}


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


def wait_until(happens, limit_s: float) -> None:
    end = time.perf_counter() + limit_s
    while time.perf_counter() < end and not happens():
        time.sleep(0.0005)


class Killer:
    """Runs the command over and over, each time killed after a random delay, until it ends by itself."""

    def __init__(self, server, seed: int, life_s: float):
        self.server, self.random, self.life_s = server, random.Random(seed), life_s
        self.kills: Counter[str] = Counter()
        self.progressed = (
            0  # runs in which a later checkpoint than the one before was reached, yet not the end
        )

    def _sleep(self, out: Path, before: dict[str, int]) -> str:
        """Returns at a random moment: of a whole life, of the loop, or around the writing of a checkpoint."""
        since = self.random.choice(["start", "first line", "partial checkpoint"])
        share = self.random.random()
        if since == "start":
            delay_s = share * self.life_s
        elif since == "first line":
            delay_s = share * self.life_s / 2
            wait_until(lambda: written(out).get("log.jsonl") != before.get("log.jsonl"), 2 * self.life_s)
        else:
            delay_s = share * self.life_s / 20
            skipped = self.random.randrange(3)
            seen = {name for name in before if name.startswith(".partial-")}
            enough = len(seen) + skipped

            def begun() -> bool:
                seen.update(path.name for path in out.glob(f"checkpoints/.partial-{checkpoint.PREFIX}*"))
                return len(seen) > enough

            wait_until(begun, 2 * self.life_s)
        time.sleep(delay_s)
        return f"{delay_s * 1000:.0f} ms after the {since}"

    def drive(self, begin: list, out: Path) -> None:
        """`begin`: the arguments of a run that begins anew in `out`."""
        reached = 0
        while True:
            resumable = (out / "run.json").exists()
            before = written(out)
            process = self.server.start(["finetune", "--out", out, "--resume"] if resumable else begin)
            when = self._sleep(out, before)
            os.kill(process, signal.SIGKILL)
            status = self.server.wait()
            step = last_whole_step(out)
            assert step >= reached, "a checkpoint that was whole is gone"
            if status != -signal.SIGKILL:
                print(f"ended with {status} before it could be killed {when}")
                assert status == 0
                return
            doing = phase(out, before)
            print(f"killed {when}, {doing}; whole: step {step}")
            self.kills[doing] += 1
            self.progressed += reached < step < STEPS
            reached = step


@pytest.mark.timeout(300)
def test_twenty_kills_at_random_moments_leave_no_trace(tmp_path):
    files = tmp_path / "inputs"
    files.mkdir()
    write_inputs(files)
    undisturbed = tmp_path / "undisturbed"
    more = ["--checkpoint-every", 2, "--keep-checkpoints", 1]
    output = tmp_path / "output.txt"
    with open(output, "wb") as file, serving(file) as server:
        for _ in range(2):  # the first one imports what is imported late
            began = time.perf_counter()
            server.start(["finetune", *arguments(files, undisturbed, *more, "--overwrite")])
            assert server.wait() == 0, output.read_text()
            life_s = time.perf_counter() - began
        killer = Killer(server, SEED, life_s)
        runs = 0
        while runs < 40 and (killer.kills.total() < KILLS or not NEEDED <= killer.kills.keys()):
            out = tmp_path / f"out-{runs}"
            runs += 1
            killer.drive(["finetune", *arguments(files, out, *more)], out)
            assert_same_end(out, undisturbed)
            assert story(out) == story(undisturbed)
            assert (out / "done.json").read_bytes() == (undisturbed / "done.json").read_bytes()
            assert sorted(path.name for path in out.rglob("*")) == sorted(
                path.name for path in undisturbed.rglob("*")
            )
        print(f"seed {SEED}: {killer.kills.total()} kills in {runs} runs: {dict(killer.kills)}")
    assert killer.kills.total() >= KILLS and killer.kills.keys() >= NEEDED, killer.kills
    assert killer.progressed >= 3
