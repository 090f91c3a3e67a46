"""`epi-kernels finetune` on several ranks: one process's masks, and checkpoints that any number of ranks goes on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from epi_kernels import MaskedEMAAdamW
from epi_kernels.finetune import checkpoint, fsdp
from epi_kernels.finetune.packing import Schedule
from epi_kernels.finetune.ranks import Ranks
from epi_kernels.optim import group_text
from epi_kernels.reference import bits
from python_tests.finetune_runs import events, weights
from python_tests.rank_runs import Signal, started
from python_tests.ranks import on_ranks
from python_tests.sharded_net import OPTIONS, persistent, steps
from python_tests.stopped_runs import STEPS, arguments, assert_same_end, story, write_inputs

ROOT = Path(__file__).resolve().parents[1]
# 19 rows, 3 a step: 2 ranks have 2 and 1 of them, and the last step of an epoch has one row alone
UNEVEN = ["--accumulation", 3]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    """One process, with one thread as the ranks have."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert started(1, *arguments(files, out, *UNEVEN, model="model"))[0].status == 0
    return out


def saved(out: Path) -> tuple[dict, dict]:
    """Weights and the optimizer's state dict of the last checkpoint."""
    last = checkpoint.list_checkpoints(out)[-1]
    return weights(last), checkpoint.load_optimizer(last)["optimizer"]


def assert_one_process(out: Path, alone: Path) -> None:
    """Gradients were added in another order: nearly the same bits, and the same files."""
    (mine, state), (theirs, wanted) = saved(out), saved(alone)
    assert mine.keys() == theirs.keys() and state["param_groups"] == wanted["param_groups"]
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5)
    differing = isolated = 0
    assert list(state["state"]) == list(wanted["state"])
    for number, entry in wanted["state"].items():
        assert {key: (one.shape, one.dtype) for key, one in state["state"][number].items()} == {
            key: (one.shape, one.dtype) for key, one in entry.items()
        }
        masks = [one[number]["isolation_mask"] for one in (state["state"], wanted["state"])]
        mask, other = (bits.unpack(one, 8 * one.numel()) for one in masks)
        differing, isolated = differing + int((mask != other).sum()), isolated + int(other.sum())
    assert isolated > 1000 and differing <= 1e-4 * sum(one.numel() for one in theirs.values())
    told = [[event for event in story(one) if event["event"] != "checkpoint"] for one in (out, alone)]
    for event, wanted in zip(*told, strict=True):
        assert event.keys() == wanted.keys() and event["event"] == wanted["event"]
        for key in ("loss", "grad_norm", "validation_loss", "retain_loss", "retain_loss_before"):
            if wanted.get(key) is not None:
                assert event[key] == pytest.approx(wanted[key], rel=1e-4), (event, wanted)
        for key in ("step", "lr", "answer_tokens", "isolated", "rows"):
            assert event.get(key) == wanted.get(key)
    # event files are named by their time
    files = [
        {path.relative_to(one) for path in one.rglob("*") if path.is_file() and "tfevents" not in path.name}
        for one in (out, alone)
    ]
    assert files[0] >= files[1]  # a stopped run has a checkpoint more


@pytest.mark.parametrize(
    "n_ranks, how", [(2, []), (2, ["--fsdp"]), (3, ["--fsdp"])], ids=["2", "2-fsdp", "3-fsdp"]
)
def test_ranks_have_the_masks_and_the_files_of_one_process(files, alone, tmp_path, n_ranks, how):
    out = tmp_path / "out"
    first, *others = started(n_ranks, *arguments(files, out, *UNEVEN, *how, model="model"))
    assert first.status == 0 and f"ranks: {n_ranks}" in first.out
    assert [(one.status, one.out, one.err) for one in others] == [(0, "", "")] * len(others)
    assert_one_process(out, alone)
    (start,) = events(out, "start")
    assert start["environment"]["ranks"] == n_ranks and start["environment"]["fsdp"] == bool(how)
    ends = [events(one, "end")[0]["state_bytes"] for one in (out, alone)]
    assert ends[0]["exp_avg"] == ends[1]["exp_avg"]  # of all ranks together where each has a part
    # evaluations add one process's numbers in its order
    before = [events(one, "eval")[0] for one in (out, alone)]
    assert before[0]["validation_loss"] == before[1]["validation_loss"]
    assert before[0]["retain_loss"] == before[1]["retain_loss"]
    net = AutoModelForCausalLM.from_pretrained(out)
    assert type(net).__name__ == "LlamaForCausalLM" and net.lm_head.weight is net.model.embed_tokens.weight
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in weights(out).items())


def test_gradient_checkpointing_blocks_and_no_packing_work_sharded(files, tmp_path):
    more = ["--gradient-checkpointing", "--layer-key", "block", "--no-packing", "--max-steps", 4]
    common = arguments(files, tmp_path / "one", *more, model="model")
    assert started(1, *common)[0].status == 0
    assert started(2, *common, "--out", tmp_path / "two", "--fsdp")[0].status == 0
    ends = [events(tmp_path / name, "end")[0]["validation_loss"] for name in ("one", "two")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


LOW = ["--dtype", "bf16", "--state-dtype", "int8", "--master-weight-bits", 24]


@pytest.mark.parametrize(
    "how", [["--dtype", "bf16"], ["--fsdp", *LOW]], ids=["replicated-bf16", "fsdp-low-precision"]
)
def test_a_signal_to_one_rank_stops_all_after_one_step_and_a_resume_has_the_bits(files, tmp_path, how):
    """Dropout is on; a second stage of plain AdamW is stopped too."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    more = [*how, "--compare", "--max-steps", STEPS]
    assert started(2, *arguments(files, whole, *more))[0].status == 0
    first, other = started(2, *arguments(files, out, *more), prepare=Signal(1, 3))
    assert first.status == other.status == 128 + signal.SIGTERM
    assert "interrupted after step 4 of 9" in first.out and "any number of ranks" in first.out
    first, other = started(2, "--out", out, "--resume", prepare=Signal(0, 4, "adamw"))
    assert first.status == other.status == 128 + signal.SIGTERM and "maybe not" not in first.err
    assert not (out / "adamw" / "done.json").exists()
    assert started(2, "--out", out, "--resume")[0].status == 0
    for folder in (".", "adamw"):
        assert_same_end(out / folder, whole / folder)
        assert [one for one in story(out / folder) if one["event"] != "checkpoint"] == [
            one for one in story(whole / folder) if one["event"] != "checkpoint"
        ]


@pytest.mark.parametrize(
    "before, after",
    [((2, "--fsdp"), (1, "--fsdp")), ((1, "--no-fsdp"), (2, "--fsdp")), ((3, "--fsdp"), (2, "--no-fsdp"))],
    ids=lambda one: f"{one[0]}{one[1]}",
)
def test_a_checkpoint_goes_on_with_any_number_of_ranks(files, alone, tmp_path, before, after):
    out = tmp_path / "out"
    (n, how), (m, then) = before, after
    ended = started(n, *arguments(files, out, *UNEVEN, how, model="model"), prepare=Signal(n - 1, 3))
    assert [one.status for one in ended] == [128 + signal.SIGTERM] * n
    first = started(m, "--out", out, "--resume", then)[0]
    assert first.status == 0 and f"ranks {n} -> {m}" in first.err
    (resumed,) = events(out, "resume")
    assert resumed["step"] == 4 and resumed["environment"]["ranks"] == m
    one, other = saved(out), saved(alone)
    for name in other[0]:
        torch.testing.assert_close(one[0][name], other[0][name], rtol=1e-4, atol=1e-5)
    masks = [[entry["isolation_mask"] for entry in state["state"].values()] for _, state in (one, other)]
    assert all(torch.equal(mask, wanted) for mask, wanted in zip(*masks, strict=True))


def test_protected_from_a_sharded_run_on_sharded_ranks(files, tmp_path):
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    more = ["--fsdp", "--state-dtype", "int8", "--max-steps", 4]
    assert started(3, *arguments(files, earlier, *more, model="model"))[0].status == 0
    assert started(2, *arguments(files, out, *more, "--protect", earlier, model="model"))[0].status == 0
    one = arguments(files, tmp_path / "one", *more, "--protect", earlier, model="model")
    assert started(1, *one)[0].status == 0
    assert events(out, "protect")[0]["kind"] == "run"
    mine, wanted = events(out, "refresh")[0], events(tmp_path / "one", "refresh")[0]
    assert mine["step"] == 0 and mine["isolated"] > 1000
    assert {**mine, "state_bytes": None} == {**wanted, "state_bytes": None}


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size, accumulation", [(1, 3), (4, 2), (5, 1)])
def test_ranks_share_the_rows_of_one_process_evenly(ranks, batch_size, accumulation):
    schedule = Schedule(19, batch_size, accumulation, seed=3)
    for step in range(2 * schedule.steps_per_epoch):
        rows = [row for batch in schedule.micro_batches(step) for row in batch]
        parts = [schedule.micro_batches(step, rank, ranks) for rank in range(ranks)]
        mine = [[row for batch in part for row in batch] for part in parts]
        assert sorted(row for part in mine for row in part) == sorted(rows)
        assert len({len(part) for part in parts}) == 1 and max(map(len, mine)) - min(map(len, mine)) <= 1
        assert max(len(batch) for part in parts for batch in part) <= batch_size
        assert len(parts[0]) == -(-len(rows) // (ranks * batch_size)) or ranks > 1


def added(rank: int) -> list:
    """Gradients of rank 0 alone, of both, of none; of two dtypes, one of them not contiguous."""
    params = [nn.Parameter(torch.zeros(3, 2, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16) * 2]
    if rank == 0:
        params[0].grad = torch.ones(3, 2)
    params[1].grad = torch.full((3, 2), 1.0 + rank, dtype=torch.bfloat16)
    params[2].grad = torch.arange(6.0).view(2, 3).t() * (1 + rank)
    Ranks(rank, 2).add_gradients(params)
    return [None if param.grad is None else param.grad.tolist() for param in params]


def test_gradients_that_some_ranks_lack_are_added_up():
    wanted = [torch.ones(3, 2), torch.full((3, 2), 3.0), 3 * torch.arange(6.0).view(2, 3).t()]
    assert on_ranks(2, added) == [[*(one.tolist() for one in wanted), None]] * 2


class Odd(nn.Module):
    """On 4 ranks blocks of 64 begin anywhere, and one has nothing of `c`."""

    def __init__(self, dtype):
        super().__init__()
        for name, shape in {"a": (65, 65), "b": (7,), "c": (5, 3)}.items():
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            self.register_parameter(name, nn.Parameter(weight.to(dtype)))


def gathered(rank: int, n_ranks: int, case: str, state: dict | None) -> dict:
    """The whole state dict after 5 steps with given gradients, or after loading one."""
    options = dict(OPTIONS[case])
    net = Odd(options.pop("dtype", torch.float32))
    if n_ranks > 1:
        fully_shard(net)
    optimizer = MaskedEMAAdamW(net.named_parameters(), isolation_ratio=0.1, mask_interval=2, **options)
    if state is None:
        optimizer.set_isolation_mask(net.b, persistent(net.b), persistent=True)
        steps(net, optimizer, 0, 5)
    else:
        optimizer.load_state_dict(state)
    return fsdp.whole_state(optimizer, Ranks(rank, n_ranks))


def groups_of(state: dict) -> list:
    """Plain parameters' groups also hold a copy of persistent masks, under the version's key; sharded ones need none."""
    return [
        group | {group_text.VERSION_KEY: group_text.read(group).version} for group in state["param_groups"]
    ]


def differing(one: dict, other: dict) -> list:
    assert groups_of(one) == groups_of(other) and one["state"].keys() == other["state"].keys()
    both = [(number, key, value) for number, entry in one["state"].items() for key, value in entry.items()]
    assert all(entry.keys() == other["state"][number].keys() for number, entry in one["state"].items())
    return [
        (number, key) for number, key, value in both if not torch.equal(value, other["state"][number][key])
    ]


@pytest.mark.parametrize("case", list(OPTIONS))
def test_a_gathered_state_is_one_processs_and_loads_with_its_bits(case):
    (one,) = on_ranks(1, gathered, 1, case, None)
    first, *others = on_ranks(4, gathered, 4, case, None)
    assert all(other["state"] == {} for other in others) and "persistent_mask" in one["state"][1]
    assert differing(on_ranks(4, gathered, 4, case, first)[0], first) == []
    loaded = on_ranks(1, gathered, 1, case, first)[0]
    if case in ("8-bit", "4-bit"):
        # Blocks of 64 begin with a rank's part: each code with its scale; one process takes them by value.
        assert first["state"][0]["exp_avg_scale"].shape == (65, 65)
        assert loaded["state"][0]["exp_avg_scale"].shape == one["state"][0]["exp_avg_scale"].shape
    else:
        assert differing(first, one) == differing(loaded, one) == []


# ---------------------------------------------------------------- the launchers themselves


def test_torchrun_stopped_by_a_signal_and_gone_on_with_by_accelerate(files, tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "out"
    more = [*UNEVEN, "--max-steps", 120, "--eval-every", 120, "--lr", 3e-4, "--checkpoint-every", 200]
    assert started(1, *arguments(files, alone, *more, model="model"))[0].status == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("TRITON_INTERPRET", None)
    given = ["-m", "epi_kernels", "finetune", *arguments(files, out, *more, model="model")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    with open(tmp_path / "said.txt", "wb") as said:
        process = subprocess.Popen(
            [*torchrun, *map(str, given)], cwd=ROOT, env=environment, stdout=said, stderr=said
        )
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if (out / "log.jsonl").exists() and b'"event": "step"' in (out / "log.jsonl").read_bytes():
                break
            time.sleep(0.01)
        process.terminate()
        process.wait(60)
    text = (tmp_path / "said.txt").read_text()
    steps = [checkpoint.load_state(one)["step"] for one in checkpoint.list_checkpoints(out)]
    assert process.returncode and "interrupted after step" in text and steps, text
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    accelerate += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    accelerate += ["-m", "epi_kernels", "finetune", "--out", str(out), "--resume"]
    done = subprocess.run(accelerate, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"continues after step {steps[-1]}" in done.stdout and "ranks: 2" in done.stdout
    assert_one_process(out, alone)
