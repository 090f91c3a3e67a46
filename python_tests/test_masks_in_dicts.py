"""Masks in the groups of a plain optimizer's state dict come to their own parameter, or the load is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from epi_kernels import MaskedEMAAdamW
from epi_kernels.optim.group_text import Fingerprint
from python_tests.harness import snapshot

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "error:the states of this")
FLAT = pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
RATIO = pytest.mark.parametrize("ratio", [0.0, 0.2])
CORNER = torch.eye(4, dtype=torch.bool)


class Linears(nn.Module):
    """Three weights of one shape, and one of another."""

    def __init__(self, frozen: str = ""):
        super().__init__()
        torch.manual_seed(0)
        for name, n in {"a": 4, "b": 4, "c": 4, "d": 5}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(4, n), requires_grad=name not in frozen))


def made(groups: str, *, named: bool = False, frozen: str = "", ratio: float = 0.0, **options):
    """``groups``: names of parameters, a word a group."""
    net = Linears(frozen)
    found = [
        {"params": [(name, getattr(net, name)) if named else getattr(net, name) for name in one]}
        for one in groups.split()
    ]
    return net, MaskedEMAAdamW(found, isolation_ratio=ratio, mask_interval=2, **options)


def step(net, optimizer, n: int = 1, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        for param in net.parameters():
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            param.grad = grad if param.requires_grad else None
        optimizer.step()
    optimizer.zero_grad()


def trained(groups: str, *, masked: str = "a", **options):
    net, optimizer = made(groups, **options)
    step(net, optimizer, 3)
    for name in masked:
        param = getattr(net, name)
        mask = torch.zeros(param.shape, dtype=torch.bool)
        mask[0] = True
        optimizer.set_isolation_mask(param, mask, persistent=True)
    return net, optimizer


def saved(folder, net, optimizer, *, flat: bool = False) -> dict:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_optimizer_state_dict(net, optimizer, options=options)
    dcp.save(state, checkpoint_id=folder)
    return state


def filled(folder, net, optimizer, *, flat: bool = False) -> dict:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_optimizer_state_dict(net, optimizer, options=options)
    dcp.load(state, checkpoint_id=folder)  # into the optimizer's own tensors
    return state


def load_in_place(folder, net, optimizer, *, flat: bool = False) -> None:
    state = filled(folder, net, optimizer, flat=flat)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    set_optimizer_state_dict(net, optimizer, optim_state_dict=state, options=options)


def lasting(net, optimizer) -> dict:
    """By name, the persistent masks."""
    return {
        name: optimizer.state[param]["persistent_mask"].tolist()
        for name, param in net.named_parameters()
        if "persistent_mask" in optimizer.state.get(param, {})
    }


def refused(says: str, folder, net, optimizer, *, flat: bool = False) -> None:
    """And the optimizer is as before."""
    state = filled(folder, net, optimizer, flat=flat)
    before = snapshot(optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    with pytest.raises(ValueError, match=says):
        set_optimizer_state_dict(net, optimizer, optim_state_dict=state, options=options)
    assert snapshot(optimizer) == before


@FLAT
@RATIO
def test_in_another_order_without_names_it_is_refused(flat, ratio, tmp_path):
    saved(tmp_path, *trained("abcd", ratio=ratio), flat=flat)
    other, fresh = made("cbad", ratio=ratio)
    says = "a mask of another parameter would come to c: .* in the order of the one that was saved"
    refused(says, tmp_path, other, fresh, flat=flat)
    other, fresh = made("dabc", ratio=ratio)  # of another shape
    refused("a mask of another parameter would come to d", tmp_path, other, fresh, flat=flat)


@FLAT
@RATIO
@pytest.mark.parametrize("groups", ["abcd", "ab cd"])
def test_in_the_same_order_without_names_it_comes_back(flat, ratio, groups, tmp_path):
    net, optimizer = trained(groups, masked="ac", ratio=ratio)
    saved(tmp_path, net, optimizer, flat=flat)
    other, fresh = made(" ".join(reversed(groups.split())), ratio=ratio)  # groups may change places
    load_in_place(tmp_path, other, fresh, flat=flat)
    assert lasting(other, fresh) == lasting(net, optimizer) and set(lasting(net, optimizer)) == set("ac")


def test_each_state_is_read_once_however_many_masks_may_be_its_parameters(tmp_path, monkeypatch):
    """Of thousands of parameters without names every one's, for every other, took minutes."""
    net, optimizer = trained("abcd", masked="abc")
    saved(tmp_path, net, optimizer)
    other, fresh = made("abcd")
    state, read, of = filled(tmp_path, other, fresh), [], Fingerprint.of
    monkeypatch.setattr(Fingerprint, "of", lambda state: (read.append(state), of(state))[1])
    set_optimizer_state_dict(other, fresh, state)
    assert lasting(other, fresh) == lasting(net, optimizer)
    assert len(read) <= 3 + 3  # of the load, and of a template


def test_parameters_that_nothing_tells_apart_get_no_mask_by_their_places_alone(tmp_path):
    """Frozen ones, of which a loader's template has no state; or ones whose exp_avg_sq are the same."""
    net, optimizer = trained("abcd", frozen="ab")
    saved(tmp_path / "frozen", net, optimizer)
    for order in ("bacd", "abcd"):
        other, fresh = made(order, frozen="ab")
        says = f"of {order[0]} or of {order[1]} cannot be told: .*names"
        refused(says, tmp_path / "frozen", other, fresh)
    net, optimizer = made("abcd")
    optimizer.set_isolation_mask(net.a, CORNER, persistent=True)
    for name in "bcd":  # each has a state, without any step
        optimizer.set_isolation_mask(
            getattr(net, name), torch.zeros_like(getattr(net, name), dtype=torch.bool)
        )
    saved(tmp_path / "zeros", net, optimizer)
    other, fresh = made("abcd")
    refused("of a or of b, c cannot be told", tmp_path / "zeros", other, fresh)


def test_what_a_shape_or_a_name_or_an_equal_mask_tells_comes_back(tmp_path):
    for case, (masked, options) in {
        "shape": ("d", {"frozen": "d"}),
        "name": ("a", {"frozen": "ab", "named": True}),
        "same mask": ("ab", {"frozen": "ab"}),
    }.items():
        net, optimizer = trained("abcd", masked=masked, **options)
        saved(tmp_path / case, net, optimizer)
        other, fresh = made("abcd", **options)
        load_in_place(tmp_path / case, other, fresh)
        assert lasting(other, fresh) == lasting(net, optimizer) and set(lasting(other, fresh)) == set(masked)


def test_a_named_optimizers_mask_is_known_by_name_where_the_other_has_none(tmp_path):
    net, optimizer = trained("abcd", named=True)
    state = saved(tmp_path, net, optimizer)
    other, fresh = made("abcd")
    load_in_place(tmp_path, other, fresh)
    assert lasting(other, fresh) == lasting(net, optimizer)
    other, fresh = made("cbad")
    refused("a mask of a would come to c", tmp_path, other, fresh)
    other, fresh = made("cbad")  # without files the names come too
    with pytest.raises(ValueError, match="has 'a' where this optimizer has 'c'"):
        set_optimizer_state_dict(other, fresh, state)


@FLAT
@pytest.mark.parametrize(
    "before, after",
    [("b acd", "bacd"), ("acd b", "bacd"), ("ab cd", "ac bd"), ("abc d", "ab cd"), ("ab cd", "a b cd")],
)
def test_parameters_that_are_grouped_otherwise_are_refused(flat, before, after, tmp_path):
    """torch gives a group what it finds of one of those that its parameters were in."""
    saved(tmp_path, *trained(before, masked="ad"), flat=flat)
    other, fresh = made(after)
    if len(after.split()) > len(before.split()) and not flat:  # torch finds no such group
        with pytest.raises(dcp.CheckpointException, match="param_groups.2"):
            load_in_place(tmp_path, other, fresh)
        return
    refused("grouped otherwise", tmp_path, other, fresh, flat=flat)


def test_named_parameters_that_a_flat_dict_grouped_otherwise_are_refused_as_such(tmp_path):
    saved(tmp_path, *trained("ab cd", masked="", named=True), flat=True)
    other, fresh = made("a bcd", named=True)
    refused("has 2 names for 1 parameters: they were grouped otherwise", tmp_path, other, fresh, flat=True)


def test_a_mask_removed_from_a_state_stays_away_and_a_warning_says_so():
    net, optimizer = trained("abcd", masked="ab", named=True)
    state = copy.deepcopy(optimizer.state_dict())
    other, fresh = made("abcd", named=True)
    fresh.load_state_dict(state)  # nothing is warned of
    assert set(lasting(other, fresh)) == set("ab")
    del state["state"][0]["persistent_mask"]
    other, fresh = made("abcd", named=True)
    with pytest.warns(UserWarning, match=r"lack masks .*\(persistent_mask of 0\).* taken as removed"):
        fresh.load_state_dict(state)
    assert set(lasting(other, fresh)) == {"b"}
    told = json.loads(fresh.state_dict()["param_groups"][0]["isolation_version"])["masks"]
    assert [place for place, found in told.items() if "persistent_mask" in found] == ["1"]


def test_a_mask_of_another_parameter_does_not_stand_for_one_that_was_lost(tmp_path):
    """Where the optimizer that loads has one of its own, which the checkpoint lacks."""
    net, optimizer = trained("abcd", ratio=0.2)
    saved(tmp_path, net, optimizer)
    other, fresh = trained("abcd", masked="b", ratio=0.2)
    state = get_optimizer_state_dict(other, fresh)
    dcp.load(state, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    fresh.state[other.b]["isolation_mask"] |= fresh.state[other.b]["persistent_mask"]
    set_optimizer_state_dict(other, fresh, state)
    assert set(lasting(other, fresh)) == set("ab")


def test_a_text_of_an_earlier_release_brings_its_masks_by_place():
    net, optimizer = trained("abcd")
    state = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    told = json.loads(state["param_groups"][0]["isolation_version"])
    state["param_groups"][0]["isolation_version"] = json.dumps(
        {key: told[key] for key in ("version", "masks")}
    )
    for key in ("persistent_mask", "isolation_mask"):
        del state["state"]["a"][key]
    other, fresh = made("abcd")
    set_optimizer_state_dict(other, fresh, state)
    assert lasting(other, fresh) == lasting(net, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (7, 3), (130, 100)], ids=str)
def test_a_fingerprint_is_of_the_bytes_that_are_stored(dtype, shape):
    moment = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    found = Fingerprint.of({"exp_avg_sq": moment})
    assert found == Fingerprint.of({"exp_avg_sq": moment.clone()}) and found.shape == shape
    assert found != Fingerprint.of(
        {"exp_avg_sq": moment.float() if dtype != torch.float32 else moment.double()}
    )
    if moment.numel():
        moment.view(-1)[0] += 1
        assert found.crc != Fingerprint.of({"exp_avg_sq": moment}).crc
    assert Fingerprint.of({"exp_avg_sq": moment.to("meta")}) is None and Fingerprint.of({}) is None


# --- through torch.optim.AdamW: T ----------------------------------------------------------------------------


def through_adamw(net, optimizer, n: int, *, by_names: bool) -> dict:
    """A state dict of AdamW that has loaded ours, without the extra keys, and taken ``n`` steps."""
    ours = copy.deepcopy(optimizer.state_dict())
    ours["state"] = {
        number: {key: state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        for number, state in ours["state"].items()
    }
    adamw = torch.optim.AdamW(net.named_parameters())
    adamw.load_state_dict(ours)
    step(net, adamw, n, seed=1)
    return get_optimizer_state_dict(net, adamw) if by_names else adamw.state_dict()


@pytest.mark.parametrize("by_names", [False, True])
def test_back_from_adamw_the_steps_that_it_took_are_counted(by_names):
    net, optimizer = trained("abcd", masked="", named=True)
    state = through_adamw(net, optimizer, 10, by_names=by_names)
    assert state["param_groups"][0]["isolation_step"] == 3  # as it was when AdamW got it
    other, fresh = made("abcd", named=True)
    set_optimizer_state_dict(other, fresh, state)
    assert fresh.param_groups[0]["isolation_step"] == 13
    # a state of ours keeps T, behind the steps of its parameters where importance was carried
    staged, second = made("abcd", named=True)
    second.carry_importance(fresh)
    step(staged, second, 2)
    third, again = made("abcd", named=True)
    again.load_state_dict(second.state_dict())
    assert again.param_groups[0]["isolation_step"] == 2 and again.state[third.a]["step"] == 15


@pytest.mark.parametrize("by_names", [False, True])
def test_masks_that_adamw_was_not_given_are_missed_aloud(by_names):
    net, optimizer = trained("abcd", named=True, ratio=0.2)
    state = through_adamw(net, optimizer, 1, by_names=by_names)
    other, fresh = made("abcd", named=True, ratio=0.2)
    with pytest.warns(UserWarning, match="persistent_mask of"):
        set_optimizer_state_dict(other, fresh, state)
    assert lasting(other, fresh) == {}
