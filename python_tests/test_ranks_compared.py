"""Ranks that differ hear of it, on every one, where a step sends nothing: at the next checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from epi_kernels import MaskedEMAAdamW, save_isolation
from epi_kernels.integrations import load_checkpoint, save_checkpoint
from python_tests.ranks import on_ranks
from python_tests.sharded_net import Net, grad, steps

DIFFERING = {
    "isolation_ratio": {"isolation_ratio": 0.4},
    "mask_interval": {"mask_interval": 3},
    "state_dtype": {"state_dtype": torch.bfloat16},
    "the lr of module.a": {"lr": 0.5},
    "the betas of module.a": {"betas": (0.9, 0.99)},
    "the isolation_mask (its CRC) of module.b": {},  # set by hand
}


def made(**options):
    net = DistributedDataParallel(Net(torch.float32))
    chosen = {"lr": 1e-2, "isolation_ratio": 0.1, "mask_interval": 2} | options
    return net, MaskedEMAAdamW(net.named_parameters(), **chosen)


def trained(**options):
    net, optimizer = made(**options)
    for step in range(3):
        for name, param in net.module.named_parameters():
            param.grad = grad(name, param, step)
        optimizer.step()
    optimizer.zero_grad()
    return net, optimizer


def heard(call, *arguments) -> str | None:
    try:
        call(*arguments)
    except ValueError as error:
        return str(error)
    return None


def plain_copies(rank: int, folder: str) -> dict:
    """What a save says of ranks that differ, and a load of those whose settings do."""
    said = {}
    save_checkpoint(f"{folder}/alike", *trained())
    for what, options in DIFFERING.items():
        net, optimizer = trained(**(options if rank == 1 else {}))
        if not options and rank == 1:
            optimizer.set_isolation_mask(net.module.b, torch.ones_like(net.module.b, dtype=torch.bool))
        said["save", what] = heard(save_checkpoint, f"{folder}/{what}", net, optimizer)
        net, optimizer = made(**(options if rank == 1 else {}))
        before = [param.clone() for param in net.parameters()]
        said["load", what] = heard(load_checkpoint, f"{folder}/alike", net, optimizer)
        if said["load", what] is not None:
            assert not optimizer.state and all(map(torch.equal, net.parameters(), before))
    return said


def shards(rank: int, folder: str) -> tuple:
    """A persistent mask is set on one rank alone; one rank alone cannot write a file."""
    net = Net(torch.float32)
    fully_shard(net)
    optimizer = MaskedEMAAdamW(net.named_parameters(), lr=1e-2, isolation_ratio=0.1, mask_interval=2)
    steps(net, optimizer, 0, 3)
    names = optimizer.param_groups[0]["param_names"]
    if rank == 1:
        optimizer.param_groups[0]["param_names"] = ["a"] * len(names)
    file = heard(save_isolation, optimizer, f"{folder}/file")
    optimizer.param_groups[0]["param_names"] = names
    if rank == 1:
        optimizer.set_isolation_mask(net.b, torch.ones(net.b.shape, dtype=torch.bool), persistent=True)
    return file, heard(save_checkpoint, f"{folder}/one", net, optimizer)


def all_of_it(rank: int, folder: str) -> tuple:
    return plain_copies(rank, folder), shards(rank, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[list, Path]:
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(2, all_of_it, str(folder)), folder


@pytest.mark.parametrize("what", DIFFERING)
def test_ranks_that_differ_write_no_checkpoint_and_read_none(what, ranks):
    """Without a word DistributedDataParallel goes on with two models, and a checkpoint is a mixture of both."""
    found, folder = ranks
    for said, _ in found:
        assert said["save", what].startswith(f"ranks disagree on {what}: "), said["save", what]
        if what.startswith("the "):  # a load brings what groups and states hold
            assert said["load", what] is None
        else:
            assert said["load", what].startswith(f"ranks disagree on {what}: ")
    assert not (folder / what).exists() and (folder / "alike").exists()


def test_a_file_that_one_rank_cannot_write_is_refused_on_all(ranks):
    (first, second), folder = ranks
    assert first[1][0] == f"rank 1: {second[1][0]}" and "give it another name" in second[1][0]
    assert not (folder / "file").exists()


def test_a_mask_that_one_rank_alone_set_is_heard_of_at_the_next_checkpoint(ranks):
    for _, (_, said) in ranks[0]:
        assert said.startswith(
            "ranks disagree on the persistent_mask (set on it) of b: False on rank 0, True"
        ), said
