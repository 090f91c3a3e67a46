"""4-bit states as a user meets them: saved, loaded, carried, refused where they cannot be, and what they cost a mask."""

from __future__ import annotations

import pytest
import torch

from epi_kernels import MaskedEMAAdamW
from epi_kernels.optim.moments import NIBBLE_KEYS, SCALE_OF
from epi_kernels.optim.sharded_state import compact, localized
from epi_kernels.reference import nibbles
from python_tests.coded_states import check_resume, moment, params
from python_tests.harness import snapshot, train

INT4 = {"state_dtype": "int4", "isolation_ratio": 0.1, "mask_interval": 2, "lr": 1e-2}


def make(named: dict[str, torch.nn.Parameter], **arguments) -> MaskedEMAAdamW:
    return MaskedEMAAdamW(named.items(), **(INT4 | arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 5])
def test_a_resumed_run_has_the_bits_of_one_never_stopped(dtype, stop):
    check_resume(make, dtype, stop)


@pytest.mark.parametrize("other", [torch.float32, "int8"])
def test_states_of_other_dtypes_load_as_4_bit_ones_and_back(other):
    named = params()
    source = make(named, state_dtype=other)
    train(source, named, 3)
    narrow = make(named)
    narrow.load_state_dict(source.state_dict())
    wide = make(named, state_dtype=other)
    wide.load_state_dict(narrow.state_dict())
    for name, p in named.items():
        for key in ("exp_avg", "exp_avg_sq"):
            exact, found = moment(source, p, key).double(), moment(narrow, p, key)
            if other == torch.float32:
                assert torch.equal(moment(wide, p, key), found)
            if name == "small":
                assert found.dtype == torch.float32 and torch.equal(found.double(), exact)
                continue
            # half a step: of levels a factor 2 apart a third of the value, and of exp_avg a third of its unit
            root = exact.abs() if key == "exp_avg_sq" else moment(source, p, "exp_avg_sq").double().sqrt()
            assert ((exact - found).abs() <= root * 0.8 + exact.abs() / 3).all()


def test_importance_carries_from_4_bit_states_and_into_them():
    old_params = params()
    old = make(old_params)
    train(old, old_params, 5)
    for state_dtype in (torch.float32, "int4"):
        new_params = params()
        new = make(new_params, state_dtype=state_dtype)
        new.carry_importance(old)
        assert new.refresh_isolation_mask().isolated > 0
        for p, q in zip(old_params.values(), new_params.values(), strict=True):
            there, here = moment(old, p, "exp_avg_sq"), moment(new, q, "exp_avg_sq")
            torch.testing.assert_close(here, there, rtol=0 if state_dtype != "int4" else 0.34, atol=0)
            assert int(new.state[q]["step"]) == 5


@pytest.mark.parametrize("damage", ["missing", "short", "dtype", "alone"])
def test_codes_without_what_they_are_read_by_are_refused_and_change_nothing(damage):
    named = params()
    optimizer = make(named)
    train(optimizer, named, 2)
    before = snapshot(optimizer)
    bad = optimizer.state_dict()
    bad["state"] = {key: dict(value) for key, value in bad["state"].items()}
    entry = bad["state"][0]
    if damage == "missing":
        del entry["exp_avg_scale"]
    elif damage == "alone":  # exp_avg is read by the codes of exp_avg_sq
        entry["exp_avg_sq"] = torch.zeros(65, 77)
        del entry["exp_avg_sq_scale"]
    else:
        scales = entry["exp_avg_scale"]
        entry["exp_avg_scale"] = scales[:-1] if damage == "short" else scales.float()
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.load_state_dict(bad)
    assert snapshot(optimizer) == before


def test_an_importance_of_its_own_is_refused_by_name_wherever_it_is_asked_for():
    with pytest.raises(ValueError, match="importance_beta must be None or beta2 .* with state_dtype='int4'"):
        make(params(), importance_beta=0.9)
    named = params()
    optimizer = make(named)
    with pytest.raises(ValueError, match="importance_beta"):
        more = torch.nn.Parameter(torch.ones(3))
        optimizer.add_param_group({"params": [("more", more)], "importance_beta": 0.5})
    train(optimizer, named, 1)
    before = snapshot(optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"] = [{**group, "importance_beta": 0.5} for group in saved["param_groups"]]
    with pytest.raises(ValueError, match="importance_beta"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before
    optimizer.param_groups[0]["importance_beta"] = 0.5
    with pytest.raises(ValueError, match="importance_beta"):
        train(optimizer, named, 1)
    with pytest.raises(ValueError, match="importance_dtype"):
        make(params(), state_dtype="int8", importance_beta=0.5, importance_dtype="int4")


def test_resized_codes_are_refused_before_a_step():
    named = params()
    optimizer = make(named)
    train(optimizer, named, 1)
    state = optimizer.state[named["large"]]
    state["exp_avg"] = state["exp_avg"][:-1].clone()
    before = named["whole"].detach().clone()
    with pytest.raises(RuntimeError, match="exp_avg"):
        train(optimizer, named, 1)
    assert torch.equal(named["whole"], before)


@pytest.mark.parametrize("ratio", [0.01, 0.1])
def test_few_elements_tie_at_the_threshold(ratio):
    """Sixteen levels a block, but scales keep mantissas of their own: the count stays within 2 % of p."""
    n, generator = 1 << 17, torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(n))
    optimizer = MaskedEMAAdamW([p], lr=0.0, isolation_ratio=ratio, mask_interval=100, state_dtype="int4")
    scale = torch.randn(n // 64, 1, generator=generator).exp()
    for _ in range(100):
        p.grad = (torch.randn(n // 64, 64, generator=generator) * scale).view(n)
        optimizer.step()
    report = optimizer.isolation_report()
    assert report is not None and report.step == 100
    k = int(ratio * n)
    assert k <= report.isolated <= 1.02 * k


def test_a_scale_keeps_its_mantissa_and_a_block_without_gradients_has_none():
    x = torch.rand(192) + 0.5
    x[64:128] = 0
    codes, first = nibbles.encode_exp_avg_sq(x, None, None)
    assert first[1] == 0 and not codes[64:128].any()
    mantissas = torch.frexp(first.float()).mantissa
    for factor in (1.01, 7.3, 1e-6):
        _, scales = nibbles.encode_exp_avg_sq(x * factor, first, None)
        assert torch.equal(torch.frexp(scales.float()).mantissa, mantissas)


def test_a_first_moment_is_cut_where_its_second_moment_was_rounded_down():
    bound = 2.0
    codes, scales = nibbles.encode_exp_avg_sq(torch.full((64,), 1.0), None, None)
    x = torch.linspace(-5, 5, 64)
    first, first_scales = nibbles.encode_exp_avg(x, None, (codes, scales), bound)
    found = nibbles.decode_exp_avg(first, first_scales, codes)
    assert found.abs().max() <= bound * 1.01
    within = x.abs() < bound
    assert ((found - x).abs()[within] <= bound / 6).all() and (found.sign() == x.sign())[x.abs() > 0.5].all()


@pytest.mark.parametrize("begins_elsewhere", [False, True])
def test_a_sharded_state_dict_s_codes_are_packed_again_or_read_by_value(begins_elsewhere):
    """Codes of a byte each, a scale beside each; where one moment's blocks began elsewhere both are values."""
    named = params()
    optimizer = make(named)
    train(optimizer, named, 3)
    p = named["large"]
    state = optimizer.state[p]
    parts = [*NIBBLE_KEYS, *(SCALE_OF[key] for key in NIBBLE_KEYS)]
    each = {key: nibbles.unpack(state[key], p.numel()).view(p.shape) for key in NIBBLE_KEYS}
    for key in (SCALE_OF[key] for key in NIBBLE_KEYS):
        scales = state[key].repeat_interleave(64)
        moved = torch.roll(scales, 13) if begins_elsewhere and key == "exp_avg_sq_scale" else scales
        each[key] = moved[: p.numel()].view(p.shape)
    found = localized(compact(each), p, "state")
    if not begins_elsewhere:
        assert all(torch.equal(found[key].view(torch.uint8), state[key].view(torch.uint8)) for key in parts)
        return
    assert set(found) == set(NIBBLE_KEYS)
    expected = nibbles.decode_exp_avg_each(each["exp_avg"], each["exp_avg_scale"], each["exp_avg_sq"])
    assert torch.equal(found["exp_avg"], expected)
    saved = optimizer.state_dict()
    saved["state"] = {0: {**found, "step": state["step"]}}
    make(params()).load_state_dict(saved)
