"""Compact states go out whole and come in compact: through state dicts, files, DCP, copies, and into a new stage."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from epi_kernels import load_isolation, save_isolation
from epi_kernels.optim.compact import RUNS_KEY
from python_tests.harness import assert_same_run, snapshot
from python_tests.row_runs import SHAPES, begun, fresh, go_on, masks, stateless

OPTIONS = {
    "float32": {"importance_beta": 0.9},
    "8 bits": {
        "dtype": torch.bfloat16,
        "state_dtype": "int8",
        "importance_beta": 0.9,
        "importance_dtype": "int8",
        "master_weight_bits": 24,
    },
}
NAMES = pytest.mark.parametrize("name", OPTIONS)


def copied(params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}


def arguments(name: str) -> dict:
    return {key: value for key, value in OPTIONS[name].items() if key != "dtype"}


@NAMES
def test_a_run_that_is_stopped_goes_on_to_the_bit(name: str, tmp_path):
    """Through torch.save; the state has the form of a run by elements, and is compact again where it came in."""
    params, optimizer = begun(**OPTIONS[name])
    torch.save(optimizer.state_dict(), tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    assert saved["state"][0]["exp_avg"].shape == SHAPES["w"] and RUNS_KEY not in saved["state"][0]
    resumed_params = copied(params)
    resumed = fresh(resumed_params, **arguments(name))
    resumed.load_state_dict(saved)
    assert_same_run(resumed, optimizer)
    assert RUNS_KEY in resumed.state[resumed_params["tail"]]
    go_on(params, optimizer, range(5, 9))
    go_on(resumed_params, resumed, range(5, 9))
    assert_same_run(resumed, optimizer)


@NAMES
def test_element_wise_optimizers_load_it_and_give_it_back(name: str):
    """There is nothing to lose on the way; element by element, what had no state begins with zeros."""
    params, optimizer = begun(**OPTIONS[name])
    element_params, back_params = copied(params), copied(params)
    element, back = fresh(element_params, "element", **arguments(name)), fresh(back_params, **arguments(name))
    element.load_state_dict(optimizer.state_dict())
    state, gone = element.state[element_params["w"]], torch.from_numpy(stateless(masks()["w"].numpy()))
    assert state["exp_avg"].shape == SHAPES["w"] and not state["exp_avg"].view(-1)[gone].any()
    back.load_state_dict(element.state_dict())
    assert_same_run(back, optimizer)
    go_on(element_params, element, range(5, 6))
    assert element.state[element_params["w"]]["exp_avg_sq"].view(-1)[gone].any()


def test_adamw_loads_what_it_knows():
    params, optimizer = begun()
    saved = optimizer.state_dict()
    adamw_params = copied(params)
    adamw = torch.optim.AdamW(list(adamw_params.items()))
    known = ("step", "exp_avg", "exp_avg_sq")
    states = {number: {key: one[key] for key in known} for number, one in saved["state"].items()}
    groups = [
        {key: value for key, value in group.items() if key in adamw.param_groups[0]}
        for group in saved["param_groups"]
    ]
    adamw.load_state_dict({"state": states, "param_groups": groups})
    assert torch.equal(adamw.state[adamw_params["w"]]["exp_avg"], saved["state"][0]["exp_avg"])


def net_of(params: dict[str, nn.Parameter]) -> nn.Module:
    net = nn.Module()
    for one, param in params.items():
        net.register_parameter(one, param)
    return net


@NAMES
def test_a_flat_dict_goes_back_into_an_optimizer_that_is_compact(name: str):
    """torch asks of it what the optimizer's own state has, and puts {} for the runs."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    params, optimizer = begun(**OPTIONS[name])
    state = get_optimizer_state_dict(net_of(params), optimizer, options=flat)
    before = snapshot(optimizer)
    set_optimizer_state_dict(net_of(params), optimizer, state, options=flat)
    assert snapshot(optimizer) == before and RUNS_KEY in optimizer.state[params["w"]]


@NAMES
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_in_place(name: str, tmp_path):
    """The template of a fresh optimizer knows nothing of masks; they come along in the groups."""

    def state_of(params, optimizer) -> dict:
        return dict(zip(("model", "optim"), get_state_dict(net_of(params), optimizer), strict=True))

    params, optimizer = begun(**OPTIONS[name])
    dcp.save(state_of(params, optimizer), checkpoint_id=tmp_path)
    loaded_params = {one: nn.Parameter(torch.zeros_like(param)) for one, param in params.items()}
    loaded = fresh(loaded_params, **arguments(name))
    state = state_of(loaded_params, loaded)
    dcp.load(state, checkpoint_id=tmp_path)
    net = net_of(loaded_params)
    set_state_dict(net, loaded, model_state_dict=state["model"], optim_state_dict=state["optim"])
    for one in (optimizer, loaded):
        go_on(params if one is optimizer else loaded_params, one, range(5, 8))
    assert_same_run(loaded, optimizer)
    assert RUNS_KEY in loaded.state[loaded_params["w"]]


@pytest.mark.parametrize("own", [False, True])
def test_importance_carried_into_a_new_stage(own: bool):
    """From a run by rows, and into one, whose rows stay isolated and without state."""
    options = {"importance_beta": 0.9} if own else {}
    _, source = begun(**options)
    params, optimizer = begun(steps=1, **options)
    by_element_params, by_element = begun("element", steps=1, **options)
    optimizer.carry_importance(source)
    by_element.carry_importance(source)
    key = "importance" if own else "exp_avg_sq"
    whole, expected = optimizer.state_dict()["state"], by_element.state_dict()["state"]
    for number in range(len(SHAPES)):
        assert torch.equal(whole[number][key], expected[number][key])
        assert torch.equal(whole[number]["isolation_mask"], expected[number]["isolation_mask"])
        assert not whole[number]["exp_avg"].any()
    assert (
        RUNS_KEY in optimizer.state[params["w"]] and RUNS_KEY not in by_element.state[by_element_params["w"]]
    )
    optimizer.refresh_isolation_mask()
    by_element.refresh_isolation_mask()
    for name in SHAPES:
        a, b = optimizer.isolation_mask(params[name]), by_element.isolation_mask(by_element_params[name])
        assert torch.equal(a, b), name


def test_masks_and_importance_through_a_file(tmp_path):
    params, optimizer = begun()
    save_isolation(optimizer, tmp_path / "file")
    for granularity in ("row", "element"):
        loaded_params = copied(params)
        loaded = fresh(loaded_params, granularity)
        load_isolation(loaded, tmp_path / "file")
        for number, name in enumerate(SHAPES):
            assert torch.equal(
                loaded.isolation_mask(loaded_params[name]), optimizer.isolation_mask(params[name])
            )
            one, other = (o.state_dict()["state"][number] for o in (loaded, optimizer))
            assert torch.equal(one["exp_avg_sq"], other["exp_avg_sq"]), name
        assert (RUNS_KEY in loaded.state[loaded_params["w"]]) == (granularity == "row")


def test_a_file_of_other_masks_is_refused_whole(tmp_path):
    params, optimizer = begun("element")
    mask = masks()["w"]
    mask[60, :5] = True
    optimizer.set_isolation_mask(params["w"], mask, persistent=True)
    save_isolation(optimizer, tmp_path / "file")
    _, by_row = begun()
    before = snapshot(by_row)
    with pytest.raises(ValueError, match="w: a persistent mask .* is of whole rows"):
        load_isolation(by_row, tmp_path / "file")
    assert snapshot(by_row) == before


def test_parameters_in_others_places_take_the_state_over():
    """As accelerate puts them there."""
    params, optimizer = begun()
    expected = optimizer.state_dict()["state"]
    new = copied(params)
    optimizer.param_groups[0]["params"] = list(new.values())
    go_on(new, optimizer, range(0))
    found = optimizer.state_dict()["state"]
    for number in range(len(SHAPES)):
        for key, value in expected[number].items():
            assert torch.equal(found[number][key], value), key
    assert RUNS_KEY in optimizer.state[new["w"]]


def test_a_saved_state_of_an_optimizer_made_for_it_is_the_same():
    """A state dict changes nothing in the optimizer that it is of."""
    params, optimizer = begun()
    before = snapshot(optimizer)
    optimizer.state_dict()
    assert snapshot(optimizer) == before
    optimizer.load_state_dict(optimizer.state_dict())
    assert RUNS_KEY in optimizer.state[params["w"]]
    after = snapshot(optimizer)
    assert [one["state"] for one in after["params"]] == [one["state"] for one in before["params"]]
