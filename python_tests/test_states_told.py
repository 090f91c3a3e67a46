"""What torch's own calls lose or misread of states between optimizers that were made otherwise is refused whole."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from epi_kernels import MaskedEMAAdamW
from epi_kernels.integrations import load_checkpoint, save_checkpoint
from python_tests.harness import snapshot
from python_tests.ranks import on_ranks
from python_tests.sharded_net import Net, differing, persistent
from python_tests.test_masks_in_dicts import FLAT, filled, saved, step
from python_tests.test_sharded_masks_in_dicts import OURS

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def made(dtype: torch.dtype = torch.float32, **options):
    net = Net(dtype)
    return net, MaskedEMAAdamW(
        net.named_parameters(), **({"lr": 1e-2, "isolation_ratio": 0.1, "mask_interval": 2} | options)
    )


def load_in_place(folder, net, optimizer, *, flat: bool = False, look=snapshot):
    """As torch's documentation has it; (what is refused, the optimizer before, and after)."""
    state = filled(folder, net, optimizer, flat=flat)
    before = look(optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    try:
        set_optimizer_state_dict(net, optimizer, optim_state_dict=state, options=options)
    except ValueError as error:
        return str(error), before, look(optimizer)
    return "", before, look(optimizer)


def values(net, optimizer) -> dict:
    return {
        (name, key): value.clone()
        for name, param in net.named_parameters()
        for key, value in optimizer.state[param].items()
    }


BF16 = {"dtype": torch.bfloat16}
OWN = {"importance_beta": 0.9}
# saved with, loaded with, what the refusal names
OTHERWISE = {
    "codes": (
        {"state_dtype": "int8"},
        {},
        "exp_avg of a was saved as 8-bit codes, and came as torch.float32",
    ),
    "codes of an importance": (
        OWN | {"importance_dtype": "int8"},
        OWN,
        "importance of a was saved as 8-bit codes, and came as torch.float32",
    ),
    "32 to 24": (
        BF16 | {"master_weight_bits": 32},
        BF16 | {"master_weight_bits": 24},
        "weight_correction of a was saved as the correction of master_weight_bits=32",
    ),
    "24 to 32": (
        BF16 | {"master_weight_bits": 24},
        BF16 | {"master_weight_bits": 32},
        "weight_correction of a was saved as the correction of master_weight_bits=24",
    ),
    "own importance": (OWN, {}, "was saved with 3 own importances and has 0 now (a, b, c: none)"),
    "masks": ({}, {"isolation_ratio": 0.0}, "was saved with 3 isolation masks and has 0 now"),
}


@FLAT
@pytest.mark.parametrize("before, after, says", OTHERWISE.values(), ids=OTHERWISE.keys())
def test_states_of_another_kind_are_refused_and_by_our_calls_or_by_numbers_they_load(
    before, after, says, flat, tmp_path
):
    net, optimizer = made(**before)
    step(net, optimizer, 5)
    saved(tmp_path / "torch", net, optimizer, flat=flat)
    heard, was, now = load_in_place(tmp_path / "torch", *made(**after), flat=flat)
    assert says in heard and OURS in heard and now == was
    other, fresh = made(**after)  # true states load by value
    fresh.load_state_dict(optimizer.state_dict())
    third, again = made(**after)
    set_optimizer_state_dict(third, again, get_optimizer_state_dict(net, optimizer))
    assert differing(values(third, again), values(other, fresh)) == []
    assert float(fresh.state[other.a]["exp_avg"].abs().max()) < 10
    if not flat:
        save_checkpoint(tmp_path / "ours", net, optimizer)
        load_checkpoint(tmp_path / "ours", third, again)
        assert differing(values(third, again), values(other, fresh)) == []


@pytest.mark.parametrize("dtype, bits, n_heard", [(BF16, 16, 2), (BF16, 24, 0), ({}, 24, 0)], ids=str)
def test_corrections_that_nothing_has_room_for_are_missed_aloud(dtype, bits, n_heard, tmp_path):
    """By torch's calls and by ours; float32 weights have none to lose."""
    net, optimizer = made(**dtype, master_weight_bits=24)
    step(net, optimizer, 5)
    saved(tmp_path / "torch", net, optimizer)
    save_checkpoint(tmp_path / "ours", net, optimizer)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert load_in_place(tmp_path / "torch", *made(**dtype, master_weight_bits=bits))[0] == ""
        load_checkpoint(tmp_path / "ours", *made(**dtype, master_weight_bits=bits))
    dropped = "the weights' corrections of this state dict"
    assert sum(str(one.message).startswith(dropped) for one in heard) == n_heard


@FLAT
def test_what_a_parameter_that_was_frozen_since_has_is_not_lost_in_silence(flat, tmp_path):
    net, optimizer = made()
    step(net, optimizer, 3)
    net.b.requires_grad_(False)
    step(net, optimizer, 2, seed=3)
    saved(tmp_path, net, optimizer, flat=flat)
    other, fresh = made()
    other.b.requires_grad_(False)
    heard, before, after = load_in_place(tmp_path, other, fresh, flat=flat)
    assert "was saved with 3 states and has 2 now (b: none)" in heard and after == before
    other, fresh = made()  # frozen after the load
    assert load_in_place(tmp_path, other, fresh, flat=flat)[0] == ""
    assert differing(values(other, fresh), values(net, optimizer)) == []


@FLAT
def test_masks_that_are_set_before_the_load_leave_the_template_whole(flat, tmp_path):
    """torch makes one where there is no state at all. A frozen parameter gets none."""

    def with_mask(frozen: bool = False):
        net, optimizer = made()
        net.a.requires_grad_(not frozen)
        optimizer.set_isolation_mask(net.b, persistent(net.b), persistent=True)
        return net, optimizer

    net, optimizer = with_mask()
    step(net, optimizer, 5)
    saved(tmp_path / "all", net, optimizer, flat=flat)
    other, fresh = with_mask()
    assert load_in_place(tmp_path / "all", other, fresh, flat=flat)[0] == ""
    assert (
        differing(values(other, fresh), values(net, optimizer)) == []
        and fresh.param_groups[0]["isolation_step"] == 5
    )
    net, optimizer = with_mask(frozen=True)
    state = get_optimizer_state_dict(net, optimizer)["state"]
    assert set(state) == {"b", "c"} and optimizer.state_bytes()["exp_avg"] == 4 * (7 + 15)


def test_importance_that_is_carried_to_some_leaves_the_template_whole(tmp_path):
    net, optimizer = made()
    step(net, optimizer, 3)
    saved(tmp_path, net, optimizer)
    source = optimizer.state_dict()
    del source["state"][0]  # never stepped there
    other, fresh = made()
    fresh.carry_importance(source)
    assert load_in_place(tmp_path, other, fresh)[0] == ""
    assert differing(values(other, fresh), values(net, optimizer)) == []


def test_a_flat_dict_for_a_template_that_lacks_states_is_refused():
    """torch takes of a flat dict what the optimizer has state of."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    net, optimizer = made()
    step(net, optimizer, 3)
    state = get_optimizer_state_dict(net, optimizer, options=flat)
    other, fresh = made()
    fresh.set_isolation_mask(other.b, torch.ones(7, dtype=torch.bool))
    before = values(other, fresh)
    with pytest.raises(ValueError, match=r"saved with 3 states and has 1 now \(a, c: none\)"):
        set_optimizer_state_dict(other, fresh, state, options=flat)
    assert differing(values(other, fresh), before) == [] and fresh.param_groups[0]["isolation_step"] == 0


def test_stages_of_a_pipeline_that_were_cut_otherwise_load_and_what_may_be_lost_is_said():
    """torch makes one flat dict of the stages', and gives a group what its first parameter's had."""
    flat, state = StateDictOptions(flatten_optimizer_state_dict=True), {}
    net = Net(torch.float32)
    for names in ("a", "bc"):
        optimizer = MaskedEMAAdamW([getattr(net, name) for name in names], isolation_ratio=0.1)
        step(net, optimizer, 3)
        stage = torch.nn.Module()
        for name in names:
            stage.register_parameter(name, getattr(net, name))
        state |= get_optimizer_state_dict(stage, optimizer, options=flat)
    other = Net(torch.float32)
    fresh = MaskedEMAAdamW(other.parameters(), isolation_ratio=0.1)
    with pytest.warns(UserWarning, match="tell of 1 parameters, as of a stage .* has 3: masks that other"):
        set_optimizer_state_dict(other, fresh, state, options=flat)
    assert [float(fresh.state[param]["step"]) for param in other.parameters()] == [3.0] * 3


@FLAT
def test_back_from_adamw_through_files_its_steps_count_and_its_lost_masks_stay_lost(flat, tmp_path):
    net, optimizer = made(isolation_ratio=0.0)
    step(net, optimizer, 3)
    optimizer.set_isolation_mask(net.b, torch.ones(7, dtype=torch.bool), persistent=True)
    ours = optimizer.state_dict()
    ours["state"] = {
        number: {key: state[key].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
        for number, state in ours["state"].items()
    }
    adamw = torch.optim.AdamW(net.named_parameters())
    adamw.load_state_dict(ours)
    step(net, adamw, 7, seed=3)
    saved(tmp_path, net, adamw, flat=flat)
    other, fresh = made(isolation_ratio=0.0)
    with pytest.warns(UserWarning, match="from step 3 to step 10: T becomes 10"):
        assert load_in_place(tmp_path, other, fresh, flat=flat)[0] == ""
    assert fresh.param_groups[0]["isolation_step"] == 10
    assert not fresh.isolation_mask(other.b).any() and "persistent_mask" not in fresh.state[other.b]


def test_a_text_that_tells_nothing_of_states_loads_as_before(tmp_path):
    """Of an earlier release; and a later one's may tell more."""
    net, optimizer = made(**OWN)
    step(net, optimizer, 3)
    for change, refused in (
        (lambda told: told.pop("states"), False),
        (lambda told: told["states"].update(x=1), True),
    ):
        state = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
        for entry in state["state"].values():
            del entry["importance"]
        told = json.loads(state["param_groups"][0]["isolation_version"])
        change(told)
        state["param_groups"][0]["isolation_version"] = json.dumps(told)
        other, fresh = made(**OWN)
        if refused:
            with pytest.raises(ValueError, match="3 own importances and has 0 now"):
                set_optimizer_state_dict(other, fresh, state)
            told["states"] = {"step": 3}
            state["param_groups"][0]["isolation_version"] = json.dumps(told)
            with pytest.raises(ValueError, match="under isolation_version of the state dict are damaged"):
                set_optimizer_state_dict(other, fresh, state)
        else:
            set_optimizer_state_dict(other, fresh, state)


INT8, INT4 = {"state_dtype": "int8"}, {"state_dtype": "int4"}
SHARDED = {
    **OTHERWISE,  # of plain ones torch itself sees that the sizes differ
    "4 to 8 bits": (INT4, INT8, "exp_avg of a was saved as 4-bit codes, and came as 8-bit codes"),
    "8 to 4 bits": (INT8, INT4, "exp_avg of a was saved as 8-bit codes, and came as 4-bit codes"),
    "4 bits": (INT4, {}, "exp_avg of a was saved as 4-bit codes, and came as torch.float32"),
}


def sharded(rank: int, folder: str) -> list:
    """What each load of another kind says, on this rank; FSDP2."""

    def cut(**options):
        net = Net(options.pop("dtype", torch.float32))
        fully_shard(net)
        return net, MaskedEMAAdamW(net.named_parameters(), lr=1e-2, mask_interval=2, **options)

    heard = []
    for number, (before, after, _) in enumerate(SHARDED.values()):
        net, optimizer = cut(**before)
        for param in net.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        saved(f"{folder}/{number}", net, optimizer)
        heard.append(load_in_place(f"{folder}/{number}", *cut(**after), look=id)[0])
    return heard


def test_states_of_another_kind_are_refused_on_every_rank(tmp_path):
    """But for masks, for which a sharded dict always has room."""
    for heard in on_ranks(2, sharded, str(tmp_path)):
        for said, (case, (_, _, says)) in zip(heard, SHARDED.items(), strict=True):
            assert says in said if case != "masks" else said == "", (case, said)
