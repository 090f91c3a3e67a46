"""`epi-kernels finetune` on several ranks, of which one fails: all end, none waits, and it is said once."""

from __future__ import annotations

import time

import pytest
import torch

from epi_kernels.finetune import checkpoint, data, importance_command, log, train
from epi_kernels.finetune import command as finetune
from epi_kernels.finetune.errors import UserError
from epi_kernels.finetune.model import pick_device
from epi_kernels.finetune.ranks import Ranks
from python_tests.finetune_runs import events
from python_tests.rank_runs import Patch, breaks, run, started
from python_tests.ranks import Failed, outcomes
from python_tests.stopped_runs import arguments, write_inputs
from python_tests.tiny_model import command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("files"))


def test_what_one_rank_cannot_read_ends_all_and_is_said_once(files, tmp_path):
    def unreadable(_):
        def read(path):
            raise UserError(f"{path}: not on this machine")

        return read

    given = arguments(files, tmp_path / "out")
    first, second = started(2, *given, prepare=Patch(1, data, "read_jsonl", unreadable))
    assert first.status == second.status == 2
    assert first.err == f"epi-kernels finetune: rank 1: {files / 'qa.jsonl'}: not on this machine\n"
    assert second.err == "" and not (tmp_path / "out").exists()
    first, second = started(2, *given, prepare=Patch(None, data, "read_jsonl", unreadable))
    assert first.status == second.status == 2 and second.err == "" and "rank" not in first.err


def test_ranks_with_other_data_or_weights_are_refused(files, tmp_path):
    def other(read):
        return lambda path: read(path)[1:]

    first, second = started(
        2, *arguments(files, tmp_path / "out"), prepare=Patch(1, data, "read_jsonl", other)
    )
    assert first.status == second.status == 1 and second.err == ""
    assert "the ranks differ in retain data, train data" in first.err and not (tmp_path / "out").exists()

    def drifts(step):
        def stepped(self, index):
            found = step(self, index)
            self.parameters[0].data[0, 0] += 1
            return found

        return stepped

    first, _ = started(2, *arguments(files, tmp_path / "out"), prepare=Patch(1, train.Run, "step", drifts))
    assert first.status == 1 and "the ranks differ in weights: after step 3" in first.err
    assert checkpoint.list_checkpoints(tmp_path / "out") == []


@pytest.mark.parametrize("how", [[], ["--fsdp"]], ids=["replicated", "fsdp"])
def test_a_rank_that_breaks_in_a_step_leaves_no_other_waiting(files, tmp_path, how):
    given = [*arguments(files, tmp_path / "out", *how)]
    began = time.monotonic()
    first, second = outcomes(2, run, given, Patch(1, train.Run, "step", breaks(4, RuntimeError("a bug"))))
    assert time.monotonic() - began < 30
    assert isinstance(first, Failed) and isinstance(second, Failed) and second.message == "a bug"
    assert [checkpoint.load_state(one)["step"] for one in checkpoint.list_checkpoints(tmp_path / "out")] == [
        3
    ]
    assert log.read(tmp_path / "out" / "log.jsonl")


@pytest.mark.parametrize("how", [[], ["--fsdp"]], ids=["replicated", "fsdp"])
def test_a_loss_that_is_not_finite_and_a_full_disk_end_all_ranks_alike(files, tmp_path, how):
    out = tmp_path / "out"
    first, second = started(2, *arguments(files, out, *how, "--lr", 1e30))
    assert first.status == second.status == 1 and second.err == ""
    assert "the weights of step" in first.err

    def full(write):
        def written(target, *_):
            raise checkpoint.DiskFull("no space left")

        return written

    first, second = started(
        2,
        *arguments(files, out, *how, "--overwrite"),
        prepare=Patch(0, checkpoint, "write_directory", full),
    )
    assert first.status == second.status == 1 and second.err == ""
    assert first.err.count("not written: no space left") == 3 and "free some space" in first.err
    assert [one["step"] for one in events(out, "checkpoint_failed")] == [3, 6, 9]


def test_half_a_launchers_environment_is_refused(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert command(finetune, *arguments(files, tmp_path / "out")) == 2
    assert "RANK, MASTER_ADDR, MASTER_PORT is not set" in capsys.readouterr().err
    given = ["--model", files / "model", "--data", files / "qa.jsonl", "--out", tmp_path / "imp.safetensors"]
    assert command(importance_command, *given) == 2
    assert "measured by one process" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", Ranks()) == "cuda" and pick_device("cuda:1", Ranks()) == "cuda:1"
    assert pick_device("auto", Ranks(5, 8, local=1)) == "cuda:1"
    assert pick_device("cpu", Ranks(5, 8, local=3)) == "cpu"
    with pytest.raises(UserError, match="no GPU for process 2 of this machine, which has 2"):
        pick_device("cuda", Ranks(2, 4, local=2))
    with pytest.raises(UserError, match="each has a device of its own"):
        pick_device("cuda:0", Ranks(1, 2, local=1))
