"""``torch.distributed.checkpoint`` of plain parameters, in one process and under DDP: a fresh optimizer gets every mask."""

from __future__ import annotations

import copy
import itertools
import json
import re

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from epi_kernels import MaskedEMAAdamW
from epi_kernels.integrations.checkpoints import load_checkpoint
from epi_kernels.optim import saving
from python_tests.harness import snapshot
from python_tests.ranks import on_ranks
from python_tests.sharded_net import OPTIONS, Net, differing, in_place, made, persistent, steps, trained

# a mask without any refresh, beside a persistent one; and cases in which every refresh selects anew
CASES = {**OPTIONS, "static": {"isolation_ratio": 0.0, "mask_interval": None}}
ONE_PROCESS = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def begun(case: str):
    """In the middle of an interval, with a persistent mask of b and, where nothing is selected, another one of a."""
    if case != "static":
        return trained(case, sharded=False)
    net, optimizer = unbegun(case)
    optimizer.set_isolation_mask(net.a, persistent(net.a))
    optimizer.set_isolation_mask(net.b, persistent(net.b), persistent=True)
    steps(net, optimizer, 0, 5)
    return net, optimizer


def unbegun(case: str):
    if case != "static":
        return made(case, sharded=False)
    net = Net(torch.float32)
    return net, MaskedEMAAdamW(net.named_parameters(), lr=1e-2, **CASES[case])


def everything(net, optimizer) -> dict:
    found = {name: param.detach().clone() for name, param in net.named_parameters()}
    for name, param in net.named_parameters():
        found |= {(name, key): value.clone() for key, value in optimizer.state[param].items()}
    return found


def wrapped(net):
    return DistributedDataParallel(net) if dist.is_initialized() else net


def saved(folder: str, net, optimizer) -> None:
    state = dict(zip(("model", "optimizer"), get_state_dict(wrapped(net), optimizer), strict=True))
    dcp.save(state, checkpoint_id=folder)


def save_each(rank: int, folder: str) -> None:
    for case in CASES:
        saved(f"{folder}/{case}", *begun(case))


def load_each(rank: int, folder: str, expected: dict) -> list:
    """What differs from an optimizer that one process never stopped."""
    found = []
    for n, case in itertools.product((1, 2), CASES):
        net, optimizer = unbegun(case)
        with torch.no_grad():
            for param in net.parameters():
                param.zero_()
        in_place(f"{folder}/{n}/{case}", wrapped(net), optimizer)
        loaded, end = expected[case]
        differs = {"loaded": differing(everything(net, optimizer), loaded)}
        steps(net, optimizer, 5, 7)
        differs["went on"] = differing(everything(net, optimizer), end)
        found += [(n, case, when, what) for when, what in differs.items() if what]
    return found


@ONE_PROCESS
def test_a_fresh_optimizer_of_one_process_or_of_ddp_goes_on_with_the_same_bits(tmp_path):
    expected = {}
    for case in CASES:
        net, optimizer = begun(case)
        loaded = everything(net, optimizer)
        steps(net, optimizer, 5, 7)
        expected[case] = loaded, everything(net, optimizer)
        assert loaded["b", "persistent_mask"].any() and loaded["a", "isolation_mask"].any()
    assert ("a", "importance_scale") in expected["8-bit"][0] and ("a", "importance") in expected["float32"][0]
    save_each(0, f"{tmp_path}/1")
    on_ranks(2, save_each, f"{tmp_path}/2")
    assert load_each(0, str(tmp_path), expected) == []
    assert on_ranks(2, load_each, str(tmp_path), expected) == [[]] * 2


@ONE_PROCESS
def test_a_checkpoint_without_persistent_masks_loads_and_its_group_has_none(tmp_path):
    net, optimizer = made("float32", sharded=False)
    assert all(group["isolation_version"] == 1 for group in optimizer.state_dict()["param_groups"])
    steps(net, optimizer, 0, 5)
    told = [json.loads(group["isolation_version"]) for group in optimizer.state_dict()["param_groups"]]
    assert not any(one["masks"] or one["in_states"] for one in told)
    saved(str(tmp_path / "last"), net, optimizer)
    other, fresh = made("float32", sharded=False)
    in_place(str(tmp_path / "last"), other, fresh)
    assert differing(everything(other, fresh), everything(net, optimizer)) == []


@ONE_PROCESS
def test_a_checkpoint_of_a_release_whose_groups_held_no_masks_still_loads(tmp_path, monkeypatch):
    """Its persistent mask, which the load in place leaves behind, acts until the next refresh; load_checkpoint has it."""
    folder = str(tmp_path / "last")
    with monkeypatch.context() as older:
        older.setattr(saving, "put_in_groups", lambda *args, **kwargs: None)
        net, optimizer = begun("float32")
        saved(folder, net, optimizer)
    expected = everything(net, optimizer)
    other, fresh = unbegun("float32")
    load_checkpoint(folder, other, fresh)
    assert differing(everything(other, fresh), expected) == []
    other, fresh = unbegun("float32")
    in_place(folder, other, fresh)
    del expected["b", "persistent_mask"]
    assert differing(everything(other, fresh), expected) == []


@ONE_PROCESS
def test_state_dicts_flattened_for_pipelines_bring_the_masks_too(tmp_path):
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    net, optimizer = begun("static")
    dcp.save(get_optimizer_state_dict(net, optimizer, options=flat), checkpoint_id=tmp_path / "flat")
    other, fresh = unbegun("static")
    other.load_state_dict(net.state_dict())
    state = get_optimizer_state_dict(other, fresh, options=flat)
    dcp.load(state, checkpoint_id=tmp_path / "flat")
    set_optimizer_state_dict(other, fresh, optim_state_dict=state, options=flat)
    assert differing(everything(other, fresh), everything(net, optimizer)) == []


def by_broadcast(rank: int) -> list:
    net, optimizer = begun("static")
    full = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True))
    other, fresh = unbegun("static")
    other.load_state_dict(net.state_dict())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(
        wrapped(other), fresh, optim_state_dict=full if rank == 0 else {}, options=options
    )
    return differing(everything(other, fresh), everything(net, optimizer))


def test_full_state_dicts_are_broadcast_to_fresh_optimizers_with_every_mask():
    assert on_ranks(2, by_broadcast) == [[], []]


def test_what_a_frozen_parameter_had_installed_comes_back_with_the_groups():
    """A loader's template has no state of it; of one that was trained before more is lost than the text has."""
    for frozen in (True, False):
        net, optimizer = unbegun("float32")
        optimizer.set_isolation_mask(net.b, persistent(net.b), persistent=True)
        for param in (net.a, net.c) if frozen else net.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        state = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
        del state["state"]["b"]
        other, fresh = unbegun("float32")
        if not frozen:
            with pytest.raises(ValueError, match="was saved with 3 states and has 2 now .b: none"):
                fresh.load_state_dict(state)
            continue
        fresh.load_state_dict(state)
        assert torch.equal(fresh.isolation_mask(other.b), persistent(other.b))
        assert torch.equal(fresh.state[other.b]["persistent_mask"], optimizer.state[net.b]["persistent_mask"])
        assert float(fresh.state[other.b]["step"]) == 0


def two_vectors(order: str):
    params = {name: torch.nn.Parameter(torch.ones(9)) for name in "xy"}
    return params, MaskedEMAAdamW([params[name] for name in order], isolation_ratio=0.3, mask_interval=1)


def of_two_vectors() -> dict:
    """By name, as ``get_optimizer_state_dict`` has it; the persistent mask is x's."""
    params, optimizer = two_vectors("xy")
    optimizer.set_isolation_mask(params["x"], persistent(params["x"]), persistent=True)
    for i, param in enumerate(params.values()):
        param.grad = torch.arange(9.0) + i
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"] = {name: state["state"][i] for i, name in enumerate("xy")}
    state["param_groups"][0]["params"] = ["x", "y"]
    return state


def test_states_of_unnamed_parameters_in_another_order_bring_their_own_masks():
    params, optimizer = two_vectors("yx")
    state = of_two_vectors()
    state["param_groups"][0]["params"] = ["y", "x"]  # as set_optimizer_state_dict has it
    optimizer.load_state_dict(state)
    assert "persistent_mask" in optimizer.state[params["x"]]
    assert "persistent_mask" not in optimizer.state[params["y"]]


@pytest.mark.parametrize("earlier", [False, True], ids=["", "of an earlier release"])
def test_a_mask_that_was_left_behind_is_not_given_to_another_parameter(earlier):
    params, optimizer = two_vectors("yx")
    state = of_two_vectors()
    state["param_groups"][0]["params"] = ["y", "x"]
    del state["state"]["x"]["persistent_mask"]
    if earlier:  # whose it is shows in the other mask alone
        text = state["param_groups"][0]["isolation_version"]
        state["param_groups"][0]["isolation_version"] = masks_text(json.loads(text)["masks"])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="in the order of the one that was saved"):
        optimizer.load_state_dict(state)
    assert snapshot(optimizer) == before


def masks_text(masks, version: int = 1, **more) -> str:
    return json.dumps({"version": version, "masks": masks} | more)


DAMAGED = {
    "version": (2, "isolation_version 2; this release reads 1"),
    "version in the text": (masks_text({"0": []}, 2), "isolation_version 2; this release reads 1"),
    "cut off": (masks_text({})[:-2], "are damaged"),
    "no masks": (masks_text([0]), "are damaged"),
    "no base64": (masks_text({"0": {"persistent_mask": "?"}}), "are damaged"),
    "unknown kind": (masks_text({"0": {"mask": "AQA="}}), "are damaged"),
    "another group's": (
        masks_text({"5": {"persistent_mask": "AQA="}}),
        "of parameters {5}, which their group lacks",
    ),
    "group": (masks_text({}, group=[0, 1]), "are damaged"),
    "no number": (masks_text({}, group=[0, 1, float("inf")]), "are damaged"),
    "owner": (masks_text({}, owners={"0": [[9], "torch.float32"]}), "are damaged"),
    "unknown kind in states": (masks_text({}, in_states={"0": ["mask"]}), "are damaged"),
    "another group's in states": (
        masks_text({}, in_states={"5": ["persistent_mask"]}),
        "of parameters {5}, which their group lacks",
    ),
    "too long": (masks_text({"1": {"persistent_mask": "AQAA"}}), "a packed mask of 9 elements"),
}


@pytest.mark.parametrize("value, says", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_masks_in_a_group_are_refused_whole(value, says):
    _, optimizer = two_vectors("xy")
    state = of_two_vectors()
    del state["state"]["x"]["persistent_mask"]
    state["param_groups"][0]["isolation_version"] = value
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=re.escape(says)):
        optimizer.load_state_dict(state)
    assert snapshot(optimizer) == before


def test_the_optimizers_own_groups_and_bytes_stay_as_they_are():
    net, optimizer = begun("float32")
    before = optimizer.state_bytes()
    state = optimizer.state_dict()
    assert isinstance(state["param_groups"][0]["isolation_version"], str)
    other, fresh = unbegun("float32")
    fresh.load_state_dict(state)
    for one in (optimizer, fresh):
        assert one.param_groups[0]["isolation_version"] == 1 and one.state_bytes() == before
