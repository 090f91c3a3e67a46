"""Checkpoints of sharded optimizers: saved on some ranks, loaded on others, whole or not at all."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from epi_kernels import MaskedEMAAdamW, load_isolation, save_isolation
from epi_kernels.distributed.shards import local, shard_of
from epi_kernels.integrations.checkpoints import load_checkpoint, save_checkpoint
from epi_kernels.reference.codec import decode_each
from python_tests.ranks import Failed, on_ranks, outcomes
from python_tests.sharded import whole
from python_tests.sharded_net import (
    OPTIONS,
    Net,
    contents,
    differing,
    grad,
    held,
    in_place,
    made,
    part,
    persistent,
    steps,
    trained,
)


def differing_here(net, optimizer, expected: dict) -> list:
    """``expected``: of one process."""
    parts = {name: shard_of(param).slices for name, param in net.named_parameters()}
    found = held(net, optimizer)
    assert found.keys() == expected.keys()
    return [
        (name, key)
        for (name, key), value in found.items()
        if not torch.equal(value, expected[name, key] if key == "step" else expected[name, key][parts[name]])
    ]


WAYS = [*((case, load_checkpoint) for case in OPTIONS), ("float32", in_place), ("8-bit", in_place)]


def save_each(rank: int, folder: str) -> None:
    for case, way in WAYS:
        net, optimizer = trained(case, sharded=True)
        if way is load_checkpoint:
            save_checkpoint(f"{folder}/{case} {way.__name__}", net, optimizer)
        else:
            state = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer), strict=True))
            dcp.save(state, checkpoint_id=f"{folder}/{case} {way.__name__}")


def load_each(rank: int, folder: str, expected: dict) -> list:
    """What differs from one process, with the number of ranks that saved, the case and the way of loading."""
    found = []
    for n, (case, way) in itertools.product((1, 2, 3, 4), WAYS):
        net, optimizer = made(case, sharded=True)
        with torch.no_grad():
            for param in net.parameters():
                local(param).zero_()
        way(f"{folder}/{n}/{case} {way.__name__}", net, optimizer)
        saved, end = expected[case]
        differing = {"loaded": differing_here(net, optimizer, saved)}
        steps(net, optimizer, 5, 7)
        differing["went on"] = differing_here(net, optimizer, end)
        assert optimizer.param_groups[0]["isolation_step"] == 7
        found += [(n, case, way.__name__, when, what) for when, what in differing.items() if what]
    return found


def test_saved_on_n_ranks_and_loaded_on_m_it_goes_on_with_the_same_bits(tmp_path):
    """Every n and m from 1 to 4, by both ways; those of an optimizer that one process never stopped."""
    expected = {}
    for case in OPTIONS:
        net, optimizer = trained(case, sharded=False)
        saved = held(net, optimizer)
        assert saved["b", "persistent_mask"].any() and saved["a", "isolation_mask"].any()
        steps(net, optimizer, 5, 7)
        expected[case] = saved, held(net, optimizer)
        assert not torch.equal(saved["a", "isolation_mask"], expected[case][1]["a", "isolation_mask"])
    assert ("a", "importance_scale") in expected["8-bit"][0] and ("a", "importance") in expected["float32"][0]
    for n in (1, 2, 3, 4):
        on_ranks(n, save_each, f"{tmp_path}/{n}")
    for m in (1, 2, 3, 4):
        assert on_ranks(m, load_each, str(tmp_path), expected) == [[]] * m


@pytest.mark.parametrize("width, begins_elsewhere", [(64, False), (66, True)])
def test_8_bit_states_reshard_by_value_within_a_step_of_the_code(width, begins_elsewhere, tmp_path):
    """Blocks of 64 begin with a rank's part: where they begin elsewhere, codes are made anew, to nearest."""
    folder = str(tmp_path / "checkpoint")
    saved = on_ranks(3, save_values, folder, width)[0]
    for loaded in on_ranks(2, load_values, folder, width):
        for key, value in saved.items():
            # 4 bits of mantissa: half a step is 1/32 of a value, and of the block's largest where values are tiny
            bound = value.abs() / 32 + value.abs().max() * 2.0**-8
            assert bool(((loaded[key] - value).abs() <= bound).all()), key
        anew = [key for key, value in saved.items() if not torch.equal(loaded[key], value)]
        assert bool(anew) == begins_elsewhere, anew


def values_of(net, optimizer) -> dict:
    """What the moments stand for, unsharded."""
    found = {}
    full = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True))
    for name, state in full["state"].items():
        for key in ("exp_avg", "exp_avg_sq", "importance"):
            value, scales = state[key].clone(), state.get(f"{key}_scale")
            assert (scales is not None) == (name == "a")
            found[name, key] = (
                value if scales is None else decode_each(value, scales, signed=key == "exp_avg")
            )
    return found


def save_values(rank: int, folder: str, width: int) -> dict:
    net, optimizer = made("8-bit", sharded=True, width=width)
    steps(net, optimizer, 0, 5)
    dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=folder)
    return values_of(net, optimizer)


def load_values(rank: int, folder: str, width: int) -> dict:
    net, optimizer = made("8-bit", sharded=True, width=width)
    state = {"optimizer": get_optimizer_state_dict(net, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(net, optimizer, optim_state_dict=state["optimizer"])
    return values_of(net, optimizer)


def fresh_template(rank: int):
    net, optimizer = made("float32", sharded=True)
    before = {name: whole(param.detach()).clone() for name, param in net.named_parameters()}
    state = get_optimizer_state_dict(net, optimizer)["state"]
    counts = [float(state[name]["step"]) for name in state], optimizer.param_groups[0]["isolation_step"]
    sums = {
        (name, key): float(whole(value).float().abs().sum())
        for name in state
        for key, value in state[name].items()
    }
    steps(net, optimizer, 0, 5)
    return counts, sums, before, contents(net, optimizer)


def test_the_template_of_a_fresh_optimizer_is_as_if_no_step_had_been_taken():
    """``get_optimizer_state_dict`` makes it by a step with lr 0 and gradients 0."""
    net, optimizer = made("float32", sharded=False)
    steps(net, optimizer, 0, 5)
    expected = {name: param.detach() for name, param in net.named_parameters()}
    for (counts, step), sums, _, end in on_ranks(2, fresh_template):
        assert counts == [0, 0, 0] and step == 0
        assert set(sums.values()) == {0.0} and ("a", "persistent_mask") in sums
        assert all(torch.equal(end[name], weight) for name, weight in expected.items())


def round_trips(rank: int, folder: str):
    """Full dicts out and in, by broadcast and by every rank; plain files; torch's AdamW."""
    net, optimizer = made("float32", sharded=True)
    optimizer.set_isolation_mask(net.b, persistent(net.b), persistent=True)
    steps(net, optimizer, 0, 5)
    full = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True))
    torch.save(full, f"{folder}/{rank}.pt")
    full = torch.load(f"{folder}/{rank}.pt", weights_only=True)
    expected, ways = contents(net, optimizer), {}
    for way, options in {
        "every rank": StateDictOptions(full_state_dict=True),
        "broadcast": StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    }.items():
        other, fresh = made("float32", sharded=True)
        other.load_state_dict(net.state_dict())
        set_optimizer_state_dict(
            other, fresh, optim_state_dict=full if way == "every rank" or rank == 0 else {}, options=options
        )
        ways[way] = contents(other, fresh)
    other, fresh = made("float32", sharded=True)
    other.load_state_dict(net.state_dict())
    fresh.load_state_dict(full)  # whole tensors, keyed by name: each rank takes its part
    ways["load_state_dict"] = contents(other, fresh)
    torch.save(optimizer.state_dict(), f"{folder}/sharded-{rank}.pt")
    other, fresh = made("float32", sharded=True)
    other.load_state_dict(net.state_dict())
    fresh.load_state_dict(torch.load(f"{folder}/sharded-{rank}.pt", weights_only=True))
    ways["this rank's own file"] = contents(other, fresh)
    return {way: differing(found, expected) for way, found in ways.items()}, full


def test_full_and_sharded_state_dicts_go_out_and_in(tmp_path):
    found = on_ranks(2, round_trips, str(tmp_path))
    for ways, _ in found:
        assert ways == dict.fromkeys(ways, []) and len(ways) == 4
    # one process takes over where two ranks stopped
    net, optimizer = made("float32", sharded=False)
    full = found[0][1]
    optimizer.load_state_dict(full)
    assert torch.equal(optimizer.isolation_mask(net.a), full["state"]["a"]["isolation_mask"])
    assert torch.equal(optimizer.state[net.a]["importance"], full["state"]["a"]["importance"])


def of_torch(rank: int):
    net, _ = made("float32", sharded=True)
    theirs = torch.optim.AdamW(net.parameters())
    for name, param in net.named_parameters():
        param.grad = part(grad(name, param, 0), param)
    theirs.step()
    ours = MaskedEMAAdamW(net.named_parameters())
    ours.load_state_dict(theirs.state_dict())
    same = [
        torch.equal(whole(ours.state[p]["exp_avg_sq"]), whole(theirs.state[p]["exp_avg_sq"]))
        for p in net.parameters()
    ]
    state = ours.state_dict()
    for entry in state["state"].values():
        for key in ("isolation_mask", "persistent_mask"):
            entry.pop(key)
    theirs.load_state_dict(state)
    carried = MaskedEMAAdamW(net.named_parameters(), isolation_ratio=0.1)
    carried.carry_importance(theirs)
    return same, carried.refresh_isolation_mask().isolated, ours.param_groups[0]["isolation_step"]


def test_torch_adamw_state_loads_and_is_loaded():
    for same, isolated, step in on_ranks(2, of_torch):
        assert all(same) and step == 1 and isolated == 418


def other_worlds(rank: int):
    """A state dict of this rank's shards where another rank loads another mesh's."""
    from torch.distributed.tensor import Shard, init_device_mesh

    net, optimizer = made("float32", sharded=True)
    steps(net, optimizer, 0, 1)
    state = optimizer.state_dict()
    before = contents(net, optimizer)
    mesh = init_device_mesh("cpu", (2,))
    moved = distribute_tensor(torch.ones(65, 64), mesh, [Shard(1)])
    if rank == 1:
        state["state"][0]["exp_avg"] = moved
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        return str(error), differing(contents(net, optimizer), before)
    return None


def test_a_state_that_one_rank_refuses_is_loaded_on_none():
    (first, unchanged), (second, as_well) = on_ranks(2, other_worlds)
    assert "another rank refused" in first and "a DTensor [65, 64]" in second
    assert unchanged == as_well == []


def disagreeing(rank: int, what: str):
    options = {"isolation_ratio": 0.1, "mask_interval": 2}
    net = Net(torch.float32)
    fully_shard(net)
    if rank == 1:
        options |= {
            "isolation_ratio": {"isolation_ratio": 0.2},
            "lr": {"lr": 0.5},
            "mask_interval": {"mask_interval": 3},
            "an interval of 1": {"mask_interval": 1},
            "ratio 0": {"isolation_ratio": 0.0},
        }.get(what, {})
    named = list(net.named_parameters())
    optimizer = MaskedEMAAdamW(
        [("other" if what == "name" and rank == 1 and name == "b" else name, param) for name, param in named],
        **options,
    )
    if what == "lr 0" and rank == 1:  # put there since, as a schedule's warm-up does
        optimizer.param_groups[0]["lr"] = 0.0
    if what == "loaded steps":
        other, trained = made("float32", sharded=True)
        steps(other, trained, 0, 2)
        early = copy.deepcopy(trained.state_dict())
        steps(other, trained, 2, 3)
        optimizer.load_state_dict(early if rank == 1 else trained.state_dict())
    if what == "isolation_step" and rank == 1:
        optimizer.param_groups[0]["isolation_step"] = 7
        optimizer.refresh_isolation_mask()
    elif what == "isolation_step":
        optimizer.refresh_isolation_mask()
    steps(net, optimizer, 0, 1)


@pytest.mark.parametrize(
    "what, says",
    {
        "isolation_ratio": "ranks disagree on isolation_ratio: 0.1 on rank 0, 0.2 on rank 1",
        "mask_interval": "ranks disagree on mask_interval",
        "lr": "ranks disagree on the lr of a: 0.001 on rank 0, 0.5 on rank 1",
        "lr 0": "ranks disagree on the lr of a: 0.001 on rank 0, 0.0 on rank 1",
        "an interval of 1": "ranks disagree on mask_interval: 2 on rank 0, 1 on rank 1",
        "ratio 0": "ranks disagree on isolation_ratio",
        "loaded steps": "the ranks are at different steps, 2 to 3",
        "name": "the parts of b on 2 ranks hold 4 different elements of 7",
        "isolation_step": "the ranks are at different steps, 0 to 7",
    }.items(),
)
def test_ranks_that_disagree_hear_of_it_on_every_rank(what, says):
    for heard in outcomes(2, disagreeing, what, timeout=60):
        assert isinstance(heard, Failed) and heard.kind == "ValueError" and says in heard.message, heard


def write_file(rank: int, folder: str) -> dict:
    net, optimizer = made("float32", sharded=True)
    optimizer.set_isolation_mask(net.b, persistent(net.b), persistent=True)
    steps(net, optimizer, 0, 5)
    save_isolation(optimizer, f"{folder}/isolation.safetensors")
    return contents(net, optimizer)


def read_file(rank: int, folder: str) -> dict:
    net, optimizer = made("float32", sharded=True)
    load_isolation(optimizer, f"{folder}/isolation.safetensors")
    return contents(net, optimizer)


def test_a_file_of_masks_and_importance_goes_from_two_ranks_to_three_and_to_one(tmp_path):
    saved = on_ranks(2, write_file, str(tmp_path))[0]
    net, optimizer = made("float32", sharded=False)
    load_isolation(optimizer, tmp_path / "isolation.safetensors")
    for loaded in [*on_ranks(3, read_file, str(tmp_path)), contents(net, optimizer)]:
        for name in "abc":
            assert torch.equal(loaded[name, "isolated"], saved[name, "isolated"])
            assert torch.equal(loaded[name, "importance"], saved[name, "importance"])
        assert loaded["b", "persistent_mask"].any()
