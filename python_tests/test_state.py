"""State: what there is from when on, and that it survives saving, loading, copying and new parameters."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from python_tests.harness import (
    assert_same_run,
    give_gradients,
    make,
    small_model,
    tensor_bytes,
    through_a_file,
    train,
    with_weights_of,
)

# Every storage that state can have: (weights, arguments).
CONFIGURATIONS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float64": (torch.float64, {}),
    "bfloat16-weights-float32-state": (torch.bfloat16, {"state_dtype": torch.float32}),
    "float32-weights-bfloat16-state": (torch.float32, {"state_dtype": torch.bfloat16}),
    "own-float32-beside-bfloat16": (torch.bfloat16, {"importance_beta": 0.9}),
    "own-bfloat16": (torch.float32, {"importance_beta": 0.9, "importance_dtype": torch.bfloat16}),
    "master-24": (torch.bfloat16, {"master_weight_bits": 24}),
    "master-32-float32-state": (torch.bfloat16, {"master_weight_bits": 32, "state_dtype": torch.float32}),
    "master-of-float32-weights": (torch.float32, {"master_weight_bits": 32}),  # they have every bit
    "ratio-0": (torch.float32, {"isolation_ratio": 0.0}),
    "unnamed": (torch.bfloat16, {"named": False}),
    "hysteresis": (torch.float32, {"hysteresis": 0.5, "scope": "layer"}),
    "layer-key": (torch.float32, {"layer_key": lambda name: name.split(".")[0]}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_resume_at_every_step(name: str):
    """Through torch.save and weights_only: the bits of a run never stopped, refreshes and rounding included."""
    dtype, arguments = CONFIGURATIONS[name]
    steps = 6
    params = small_model(dtype)
    whole = make(params, **arguments)
    train(whole, params, steps)
    stopped_params = small_model(dtype)
    stopped = make(stopped_params, **arguments)
    for stop in range(steps + 1):
        resumed_params = with_weights_of(stopped_params, dtype=dtype)
        resumed = make(resumed_params, **arguments)
        resumed.load_state_dict(through_a_file(stopped.state_dict()))
        assert_same_run(resumed, stopped)
        train(resumed, resumed_params, range(stop, steps))
        assert_same_run(resumed, whole)
        if stop < steps:
            train(stopped, stopped_params, range(stop, stop + 1))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_state_keys_and_dtypes(name: str):
    """Complete and zeroed at the first step, so that a template for a distributed load has every key."""
    dtype, arguments = CONFIGURATIONS[name]
    params = small_model(dtype)
    optimizer = make(params, **arguments)
    assert len(optimizer.state) == 0 and optimizer.param_groups[0]["isolation_step"] == 0
    expected = {"step", "exp_avg", "exp_avg_sq"}
    if arguments.get("isolation_ratio") != 0.0:
        expected.add("isolation_mask")
    if "importance_beta" in arguments:
        expected.add("importance")
    if "master_weight_bits" in arguments and dtype == torch.bfloat16:
        expected.add("weight_correction")
    for number in range(4):  # before and after the first refresh
        train(optimizer, params, range(number, number + 1))
        assert type(optimizer.param_groups[0]["isolation_step"]) is int
        assert optimizer.param_groups[0]["isolation_step"] == number + 1
        for p in params.values():
            state = optimizer.state[p]
            assert state.keys() == expected
            assert state["step"].dtype == torch.float32 and state["step"].shape == ()
            assert state["step"].item() == number + 1
            moment = arguments.get("state_dtype", dtype)
            for key in ("exp_avg", "exp_avg_sq"):
                assert state[key].dtype == moment and state[key].shape == p.shape
            if "importance" in expected:
                assert state["importance"].dtype == arguments.get("importance_dtype", torch.float32)
                assert state["importance"].shape == p.shape
            if "weight_correction" in expected:
                bits = arguments["master_weight_bits"]
                assert state["weight_correction"].dtype == (torch.int8 if bits == 24 else torch.int16)
                assert state["weight_correction"].shape == p.shape
            if "isolation_mask" in expected:
                assert state["isolation_mask"].dtype == torch.uint8
                assert state["isolation_mask"].shape == (-(-p.numel() // 8),)


def test_persistent_mask_is_saved_and_acts_after_a_load():
    params = small_model()
    optimizer = make(params, isolation_ratio=0.1)
    mask = torch.arange(95).reshape(19, 5) % 3 == 0
    optimizer.set_isolation_mask(params["embed"], mask, persistent=True)
    train(optimizer, params, 3)
    resumed_params = with_weights_of(params)
    resumed = make(resumed_params, isolation_ratio=0.1)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    before = resumed_params["embed"].detach().clone()
    train(resumed, resumed_params, range(3, 7))
    train(optimizer, params, range(3, 7))
    assert_same_run(resumed, optimizer)
    assert torch.equal(resumed_params["embed"][mask], before[mask])


@pytest.mark.parametrize("lost", ["bits", "the mask"])
def test_persistent_bits_protect_at_once_though_the_other_mask_lacks_them(lost):
    params = small_model()
    optimizer = make(params, mask_interval=50)
    train(optimizer, params, 2)
    bits = torch.zeros_like(params["embed"], dtype=torch.bool)
    bits[0] = True
    optimizer.set_isolation_mask(params["embed"], bits, persistent=True)
    saved = copy.deepcopy(optimizer.state_dict())
    number = list(params).index("embed")
    if lost == "bits":
        saved["state"][number]["isolation_mask"].zero_()
    else:
        del saved["state"][number]["isolation_mask"]
    fresh_params = small_model()
    fresh = make(fresh_params, mask_interval=50)
    fresh.load_state_dict(saved)
    assert torch.equal(fresh.isolation_mask(fresh_params["embed"]), bits)


def test_state_dict_is_plain_and_deterministic():
    """Tensors and plain values alone: no callable, no dtype of ours; the same twice."""
    params = small_model()
    optimizer = make(params, layer_key=lambda name: name[0])
    train(optimizer, params, 3)

    def check(value):
        if isinstance(value, dict):
            for key, inner in value.items():
                assert isinstance(key, (str, int))
                check(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                check(inner)
        else:
            assert value is None or isinstance(value, (torch.Tensor, str, int, float, bool)), value

    check(optimizer.state_dict())
    assert repr(optimizer.state_dict()) == repr(optimizer.state_dict())


def test_loading_does_not_share_memory():
    params = small_model()
    optimizer = make(params)
    train(optimizer, params, 2)
    saved = optimizer.state_dict()
    other_params = with_weights_of(params)
    other = make(other_params)
    other.load_state_dict(saved)
    before = repr(saved)
    train(other, other_params, 3)
    assert repr(optimizer.state_dict()) == before


# --- torch.optim.AdamW in and out ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("named", [True, False])
def test_adamw_state_loads(dtype: torch.dtype, named: bool):
    params = small_model(dtype)
    adamw = torch.optim.AdamW(params.items() if named else params.values())
    params["scale"].requires_grad_(False)
    for number in range(3):
        give_gradients(params, number)
        if number == 0:
            params["block.bias"].grad = None
        params["scale"].grad = None
        adamw.step()
    optimizer = make(params, named=named)
    optimizer.load_state_dict(through_a_file(adamw.state_dict()))
    assert optimizer.param_groups[0]["isolation_step"] == 3  # the largest step
    for p in params.values():
        for key, value in adamw.state[p].items():
            mine = optimizer.state[p][key]
            assert torch.equal(mine, value) and mine.dtype == value.dtype, key
    assert optimizer.state[params["block.bias"]]["step"].item() == 2
    assert optimizer.param_groups[0]["weight_decay"] == adamw.param_groups[0]["weight_decay"]
    train(optimizer, params, 3)
    assert optimizer.param_groups[0]["isolation_step"] == 6


def test_ours_loads_into_adamw_without_the_extra_keys():
    params = small_model()
    optimizer = make(params, importance_beta=0.9)
    train(optimizer, params, 3)
    saved = optimizer.state_dict()
    kept = ("step", "exp_avg", "exp_avg_sq")
    saved["state"] = {i: {key: state[key] for key in kept} for i, state in saved["state"].items()}
    fresh = torch.optim.AdamW(params.items())
    ours = set(optimizer.param_groups[0]) - set(fresh.param_groups[0])
    assert "isolation_step" in ours
    for group in saved["param_groups"]:
        for key in ours:
            del group[key]
    fresh.load_state_dict(saved)
    give_gradients(params, 9)
    fresh.step()
    assert fresh.state[params["embed"]]["step"].item() == 4


# --- copies -------------------------------------------------------------------------------------------------


def _pickled(both):
    buffer = io.BytesIO()
    torch.save(both, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), _pickled])
def test_copies_go_their_own_way(how):
    params = small_model(torch.bfloat16)
    optimizer = make(params, importance_beta=0.9)
    train(optimizer, params, 3)
    other_params, other = how((params, optimizer))
    assert_same_run(optimizer, other)
    assert other.isolation_report().as_dict() == optimizer.isolation_report().as_dict()
    saved = copy.deepcopy(optimizer.state_dict())
    train(other, other_params, range(3, 8))
    assert repr(optimizer.state_dict()) == repr(saved)
    train(optimizer, params, range(3, 8))
    assert_same_run(optimizer, other)


# --- parameters that come and go ----------------------------------------------------------------------------


def test_group_added_later():
    """It joins at the T of the run, becomes eligible at once and has its own hyper-parameters."""
    params = small_model()
    optimizer = make(params, mask_interval=4)
    train(optimizer, params, 3)
    late = torch.nn.Parameter(torch.linspace(-1, 1, 50))
    optimizer.add_param_group({"params": [("late", late)], "lr": 0.5, "importance_beta": 0.5})
    assert [group["isolation_step"] for group in optimizer.param_groups] == [3, 3]
    assert optimizer.param_groups[1]["isolate"] is True
    everything = params | {"late": late}
    train(optimizer, everything, range(3, 4))
    assert [group["isolation_step"] for group in optimizer.param_groups] == [4, 4]
    assert optimizer.state[late]["step"].item() == 1 and "importance" in optimizer.state[late]
    assert "importance" not in optimizer.state[params["embed"]]
    assert sum(row.elements for row in optimizer.isolation_report().layers) == 152 + 50
    assert optimizer.isolation_report().isolated == int(0.2 * 202)


def test_frozen_then_unfrozen():
    """Without a gradient it is skipped whole; its own step counts its own updates."""
    params = small_model()
    optimizer = make(params)
    frozen = params["block.weight"]
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    for number in range(3):
        give_gradients(params, number)
        frozen.grad = None
        optimizer.step()
    assert torch.equal(frozen, before) and frozen not in optimizer.state
    frozen.requires_grad_(True)
    train(optimizer, params, range(3, 5))
    assert optimizer.state[frozen]["step"].item() == 2
    assert optimizer.state[params["embed"]]["step"].item() == 5
    frozen.grad = None
    state = {key: value.clone() for key, value in optimizer.state[frozen].items() if "mask" not in key}
    weights = tensor_bytes(frozen)
    params["embed"].grad = torch.ones(19, 5)
    optimizer.step()
    assert tensor_bytes(frozen) == weights
    assert all(torch.equal(optimizer.state[frozen][key], value) for key, value in state.items())


def test_tied_parameter_is_one_parameter():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(11, 5)
            self.head = torch.nn.Linear(5, 11, bias=False)
            self.head.weight = self.embed.weight

    torch.manual_seed(0)
    model = Tied()
    optimizer = make(dict(model.named_parameters()), mask_interval=1)
    model.head(model.embed(torch.arange(11))).square().sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 1
    assert optimizer.isolation_report().isolated == 11
    assert torch.equal(
        optimizer.isolation_mask(model.head.weight), optimizer.isolation_mask(model.embed.weight)
    )


def test_names_are_kept():
    params = small_model()
    optimizer = make(params)
    assert optimizer.param_groups[0]["param_names"] == list(params)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == list(params)


def test_random_numbers_follow_the_name_and_not_the_position():
    """So that a parameter's rounding stays the same when others are added before it."""
    runs = []
    for order in (1, -1):
        params = dict(list(small_model(torch.bfloat16).items())[::order])
        optimizer = make(params, isolation_ratio=0.0)
        for number in range(3):
            for name, p in params.items():
                p.grad = torch.full_like(p, 0.1 * (number + 1) + len(name))
            optimizer.step()
        runs.append(params)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
