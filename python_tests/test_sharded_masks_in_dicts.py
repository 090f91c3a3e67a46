"""Masks of sharded parameters through torch's own calls: they come along, or every rank refuses and says what to use."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from epi_kernels import MaskedEMAAdamW
from epi_kernels.integrations import save_checkpoint
from python_tests.ranks import on_ranks
from python_tests.sharded import whole
from python_tests.sharded_net import Net, differing, held, steps

OURS = "epi_kernels.integrations.save_checkpoint and load_checkpoint"
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FULL = StateDictOptions(full_state_dict=True)


def made(ratio: float, *, sharded: bool = True):
    net = Net(torch.float32)
    if sharded:
        fully_shard(net)
    return net, MaskedEMAAdamW(net.named_parameters(), lr=1e-2, isolation_ratio=ratio, mask_interval=2)


def last_one(net) -> torch.Tensor:
    """Of b, the bit that lies on the last rank."""
    mask = torch.zeros(net.b.shape, dtype=torch.bool)
    mask[-1] = True
    return mask


def trained(ratio: float, *, masked: bool, sharded: bool = True):
    net, optimizer = made(ratio, sharded=sharded)
    steps(net, optimizer, 0, 3)
    if masked:
        optimizer.set_isolation_mask(net.b, last_one(net), persistent=True)
    return net, optimizer


def told(optimizer) -> dict:
    """Of which masks the groups of this rank's state dict say that they are in the states, by place."""
    version = optimizer.state_dict()["param_groups"][0]["isolation_version"]
    return json.loads(version)["in_states"] if isinstance(version, str) else {}


def loaded(folder: str, net, optimizer, options: StateDictOptions) -> str:
    """What is refused, where it changes nothing; or whether b's persistent mask came along."""
    state = get_optimizer_state_dict(net, optimizer, options=options)
    dcp.load(state, checkpoint_id=folder)
    before = held(net, optimizer) if optimizer.state.keys() == set(net.parameters()) else {}
    try:
        set_optimizer_state_dict(net, optimizer, optim_state_dict=state, options=options)
    except ValueError as error:
        changed = differing(held(net, optimizer), before) if before else []
        return f"{error} {changed or ''}"
    mask = whole(optimizer.isolation_mask(net.b))
    return "with the mask" if bool(mask[-1]) and told(optimizer) else "without a mask"


def by_torch(rank: int, folder: str) -> tuple[dict, dict]:
    """(what became of each load, what each rank's groups say of the states)"""
    became, said = {}, {}
    for ratio in (0.0, 0.1):
        for masked in (False, True):
            net, optimizer = trained(ratio, masked=masked)
            said[ratio, masked, "saved"] = told(optimizer)
            for options in (StateDictOptions(), FLAT):
                flat = options.flatten_optimizer_state_dict
                place = f"{folder}/{ratio} {masked} {flat}"
                dcp.save(get_optimizer_state_dict(net, optimizer, options=options), checkpoint_id=place)
                other, fresh = made(ratio)
                became[ratio, masked, "flat" if flat else "shards"] = loaded(place, other, fresh, options)
                said[ratio, masked, "loaded"] = said.get((ratio, masked, "loaded"), {}) or told(fresh)
                if flat:
                    continue
                other, fresh = made(ratio)
                other.b.requires_grad_(False)
                became[ratio, masked, "frozen"] = loaded(place, other, fresh, StateDictOptions(strict=False))
                if not ratio:
                    became[ratio, masked, "whole"] = loaded(place, *made(ratio, sharded=False), options)
            optimizer.set_isolation_mask(net.b, torch.zeros_like(last_one(net)), persistent=True)
            said[ratio, masked, "lifted"] = told(optimizer)
    return became, said


def from_whole(rank: int) -> dict:
    """A plain optimizer's full state dict into a sharded one."""
    heard = {}
    for ratio in (0.0, 0.1):
        full = get_optimizer_state_dict(*trained(ratio, masked=True, sharded=False), options=FULL)
        other, fresh = made(ratio)
        try:
            set_optimizer_state_dict(other, fresh, optim_state_dict=full, options=FULL)
        except ValueError as error:
            heard[ratio] = str(error)
        else:
            heard[ratio] = torch.equal(whole(fresh.isolation_mask(other.b)), last_one(other))
    return heard


def a_step_missed(rank: int, folder: str) -> tuple:
    """Under DDP one rank's second gradient is refused, and it goes on with the next batch."""
    net = DistributedDataParallel(torch.nn.Linear(5, 3))
    optimizer = MaskedEMAAdamW(net.named_parameters(), lr=1e-2)
    save_checkpoint(f"{folder}/ddp", net, optimizer)
    for batch in range(3):
        net(torch.ones(2, 5)).sum().backward()
        if rank == 1 and batch == 1:
            net.module.weight.grad = net.module.weight.grad.to_sparse()
        try:
            optimizer.step()
        except RuntimeError as error:
            assert "is sparse" in str(error)
        optimizer.zero_grad()
    step = optimizer.param_groups[0]["isolation_step"]
    try:
        save_checkpoint(f"{folder}/ddp", net, optimizer)
    except ValueError as error:
        return step, str(error)
    return step, None


def all_of_it(rank: int, folder: str) -> tuple:
    return by_torch(rank, folder), from_whole(rank), a_step_missed(rank, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list:
    return on_ranks(2, all_of_it, str(tmp_path_factory.mktemp("masks")))


LOST = "this load has left behind ({}persistent_mask of b): a fresh optimizer's dict has no room for them"


@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_what_torchs_calls_leave_behind_of_persistent_masks_is_refused_on_every_rank(ratio, ranks):
    for (became, _), *_ in ranks:
        assert became[ratio, True, "shards"] == "with the mask"
        for way in ("flat", "frozen", *(["whole"] if not ratio else [])):
            heard = became[ratio, True, way]
            assert "isolation_mask of b, persistent_mask of b" in heard or ratio, heard
            assert "persistent_mask of b" in heard and f"Use {OURS}" in heard and heard[-2:] != "] ", heard
            if way == "frozen":  # its importance is lost as well
                assert "was saved with 3 states and has 2 now (b: none)" in became[ratio, False, way]
            else:
                assert became[ratio, False, way] == "without a mask"


def test_every_rank_says_the_same_of_a_mask_whose_bits_lie_on_one(ranks):
    """Any rank's groups may be those that a checkpoint holds."""
    (_, said), (_, as_well) = (found for found, *_ in ranks)
    assert said == as_well
    for (ratio, masked, when), found in said.items():
        kinds = ["persistent_mask"] if ratio else ["isolation_mask", "persistent_mask"]
        wanted = {"1": kinds} if masked else {}
        if when == "lifted":
            wanted = {} if ratio else {"1": ["isolation_mask"]}
        assert found == wanted, (ratio, masked, when)


def test_masks_packed_whole_are_not_taken_for_shards(ranks):
    for _, heard, _ in ranks:
        assert heard[0.0] is True
        assert "packed" in heard[0.1] and f"use {OURS}" in heard[0.1]


def test_a_rank_that_went_on_without_a_step_is_heard_at_the_next_checkpoint(ranks):
    """No rank sends anything in a step: of DistributedDataParallel's the drift would go on unheard."""
    for rank, (*_, (step, heard)) in enumerate(ranks):
        assert step == 3 - rank
        assert heard.startswith(f"the ranks are at different steps, 2 to 3 (this one at {step})")
