"""`epi-kernels reproduce` as ranks and launchers run it: the first speaks, and what ends one of them ends all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from epi_kernels.repro import command as reproduce
from epi_kernels.repro import workshop
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.methods.base import Running
from python_tests.rank_runs import Ended, Patch, breaks, run, started
from python_tests.ranks import Failed, outcomes
from python_tests.repro_runs import MODEL, STRINGS, SUMS, manifests

ROOT = Path(__file__).resolve().parents[1]


def preset(folder: Path) -> Path:
    described = {
        "name": "tiny",
        "seeds": [1, 2],
        "models": {"llama": MODEL.model_dump(exclude_none=True)},
        "tasks": {one.kind: one.model_dump(exclude_none=True) for one in (SUMS, STRINGS)},
        "drift": {
            "tasks": ["sums", "strings"],
            "recipe": {"lr": 1e-2, "steps": 4, "batch": 6},
            "ratios": [0.1],
            "every": 2,
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(described))
    return path


def given(folder: Path, *more) -> list:
    return ["--preset", preset(folder), "--table", "drift", "--out", folder / "out", *more]


def on(n_ranks: int, *arguments, prepare=None) -> list[Ended]:
    return started(n_ranks, *arguments, prepare=prepare, module=reproduce)


def broken(_):
    def make_task(spec, seed):
        raise ReproError(f"task {spec.kind}: not on this machine")

    return make_task


def test_the_first_rank_alone_speaks_and_an_error_of_another_ends_all(tmp_path):
    assert [one.status for one in on(2, *given(tmp_path, "--workers", 2))] == [2, 2]
    one, other = on(2, *given(tmp_path), prepare=Patch(1, workshop, "make_task", broken))
    assert (one.status, other.status, other.err) == (2, 2, "")
    assert one.err.endswith("epi-kernels reproduce: rank 1: task strings: not on this machine\n")
    assert manifests(tmp_path / "out" / "runs") == {}
    one, other = on(2, *given(tmp_path))
    assert (one.status, other.status, other.out, other.err) == (0, 0, "", ""), one.err
    assert "The page: " in one.out and (tmp_path / "out" / "index.html").is_file()
    assert len(manifests(tmp_path / "out" / "runs")) == 3


@pytest.mark.parametrize(
    ("error", "kind"), [(RuntimeError("a bug"), "RuntimeError"), (ReproError("this rank's"), "SystemExit")]
)
def test_a_rank_that_breaks_in_a_step_leaves_no_other_waiting(tmp_path, error, kind):
    began = time.monotonic()
    both = outcomes(2, run, given(tmp_path), Patch(1, Running, "step", breaks(2, error)), reproduce)
    assert time.monotonic() - began < 30 and all(isinstance(one, Failed) for one in both)
    assert both[1].kind == kind
    (base,) = manifests(tmp_path / "out" / "runs").values()
    assert base["run"]["kind"] == "base"


def drifts(step):
    def stepped(self, index):
        step(self, index)
        self.optimizer.param_groups[0]["params"][0].data += 1

    return stepped


def test_ranks_whose_weights_part_or_whose_arguments_differ_are_refused(tmp_path):
    one, other = on(2, *given(tmp_path), prepare=Patch(1, Running, "step", drifts))
    assert (one.status, other.status, other.err) == (1, 1, "")
    assert "the ranks differ in weights: the stage's are no longer those of one run at its end" in one.err
    one, other = on(2, *given(tmp_path), prepare=Patch(1, reproduce, "_chosen", seeds))
    assert one.status == 1 and "the ranks differ in the runs" in one.err


def seeds(chosen):
    def other(args):
        found, names = chosen(args)
        return found.with_seeds([7]), names

    return other


def test_torchrun_stopped_by_a_time_limit_and_gone_on_with_by_one_process(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("TRITON_INTERPRET", None)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*torchrun, "-m", "epi_kernels", "reproduce", *given(tmp_path, "--time-limit", 1e-3)]
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("stopped at the time limit: 3 of 3 runs are left") == 1
    assert on(1, *given(tmp_path, "--workers", 1))[0].status == 0
