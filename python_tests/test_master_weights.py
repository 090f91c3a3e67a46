"""bfloat16 weights with an 8- or 16-bit correction beside them: what it is for, and what may happen to it."""

from __future__ import annotations

import io
import warnings

import pytest
import torch

from epi_kernels import MaskedEMAAdamW
from epi_kernels.reference import master
from python_tests.harness import Target, assert_same_run, make, small_model, snapshot, train

BITS = tuple(master.CORRECTION_DTYPES)


def bf16(*shape: int, seed: int = 0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16())


def test_32_bits_are_float32_weights(target: Target):
    """From the same weights and gradients: float32 weights bit for bit, masks too, through several refreshes."""
    arguments = {
        "state_dtype": torch.float32, "isolation_ratio": 0.1, "mask_interval": 3, "lr": 1e-3,
        "backend": target.backend,
    }  # fmt: skip
    narrow = [bf16(33, 17), bf16(257, seed=1)]
    wide = [torch.nn.Parameter(p.detach().float()) for p in narrow]
    ours = MaskedEMAAdamW(narrow, master_weight_bits=32, **arguments)
    theirs = MaskedEMAAdamW(wide, **arguments)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4 if target.interpreted else 20):
        for p, q in zip(narrow, wide, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
    for p, q in zip(narrow, wide, strict=True):
        assert torch.equal(ours.master_weight(p), q)
        assert torch.equal(ours.isolation_mask(p), theirs.isolation_mask(q))
        # the model computes with the nearest bfloat16; exact ties apart, that is torch's own rounding
        assert torch.equal(p, q.bfloat16())


@pytest.mark.parametrize("stochastic_rounding", [True, False])
def test_small_updates_add_up(stochastic_rounding: bool):
    """Steps a hundredth of a bfloat16 unit: without a correction, to nearest, weights never move at all."""
    moved = {}
    for bits in (16, *BITS):
        p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = MaskedEMAAdamW(
            [p], lr=1e-4, weight_decay=0.0, isolation_ratio=0.0, state_dtype=torch.float32, master_weight_bits=bits,
            stochastic_rounding=stochastic_rounding,
        )  # fmt: skip
        for _ in range(200):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[bits] = 1.0 - optimizer.master_weight(p).double().mean().item()
    assert moved[32] == pytest.approx(0.02, rel=1e-3)
    # below 1 numbers of 24 bits are 2^-16 apart: to nearest a step of 6.55 of those is always 7
    assert moved[24] == pytest.approx(0.02 if stochastic_rounding else 0.02 * 7 / 6.55, rel=1e-2)
    if not stochastic_rounding:
        assert moved[16] == 0.0


@pytest.mark.parametrize("bits", BITS)
def test_isolated_elements_keep_their_corrections(bits: int, target: Target):
    p = bf16(300)
    optimizer = MaskedEMAAdamW(
        [p], lr=0.1, weight_decay=0.1, mask_interval=None, master_weight_bits=bits, backend=target.backend
    )
    generator = torch.Generator().manual_seed(0)

    def step():
        p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        optimizer.step()

    step()
    mask = torch.rand(300, generator=generator) < 0.5
    optimizer.set_isolation_mask(p, mask)
    before = p.detach().clone(), optimizer.state[p]["weight_correction"].clone()
    for _ in range(3):
        step()
    for now, then in zip((p.detach(), optimizer.state[p]["weight_correction"]), before, strict=True):
        assert torch.equal(now[mask], then[mask])
        assert not torch.equal(now[~mask], then[~mask])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0e38, 1e-40, torch.inf])
def test_a_weight_that_somebody_sets(value: float, bits: int, target: Target):
    """Its correction was another's. It never makes a NaN, and moves the weight by half a unit at most."""
    p = bf16(512)
    optimizer = MaskedEMAAdamW(
        [p], lr=1e-2, isolation_ratio=0.0, master_weight_bits=bits, backend=target.backend
    )
    p.grad = torch.randn(512, generator=torch.Generator().manual_seed(0)).bfloat16()
    optimizer.step()
    correction = optimizer.state[p]["weight_correction"]
    assert (correction < 0).any() and (correction > 0).any()
    with torch.no_grad():
        p.fill_(value)
    held = optimizer.master_weight(p)
    assert not held.isnan().any()
    assert torch.equal(master.split(held, correction.dtype, None)[0], p.detach())
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(optimizer.master_weight(p), held)
    assert torch.equal(p, torch.full_like(p, value))


def saved(optimizer: MaskedEMAAdamW) -> dict:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_loading_into_another_width():
    params = small_model(torch.bfloat16)
    optimizer = make(params, master_weight_bits=32)
    train(optimizer, params, 3)
    wide = {p: optimizer.master_weight(p) for p in params.values()}
    for bits, bound in ((32, 0.0), (24, 2.0**-16), (16, 2.0**-8)):
        other = make(params, master_weight_bits=bits)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            other.load_state_dict(saved(optimizer))
        dropped = "corrections of this state dict (master_weight_bits=32) are dropped"
        assert [dropped in str(one.message) for one in heard] == [True] * (bits == 16)
        for p, weight in wide.items():
            assert ((other.master_weight(p) - weight).abs() <= bound * weight.abs()).all()
            assert ("weight_correction" in other.state[p]) == (bits > 16)
    narrow = make(params, master_weight_bits=24)
    narrow.load_state_dict(saved(optimizer))
    again = make(params, master_weight_bits=32)
    again.load_state_dict(saved(narrow))
    for p in params.values():
        assert torch.equal(again.master_weight(p), narrow.master_weight(p))


@pytest.mark.parametrize("source", [torch.optim.AdamW, MaskedEMAAdamW])
def test_a_state_without_corrections_starts_at_zero(source):
    params = small_model(torch.bfloat16)
    plain = source(list(params.values()))
    train(plain, params, 2)
    optimizer = make(params, named=False, master_weight_bits=24)
    optimizer.load_state_dict(plain.state_dict())
    for p in params.values():
        assert not optimizer.state[p]["weight_correction"].any()
        assert torch.equal(optimizer.master_weight(p), p.float())


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(3, dtype=torch.int8), torch.zeros(19, 5), torch.zeros(19, 5, dtype=torch.int8, device="meta"), None],
    ids=["shape", "dtype", "meta", "none"],
)  # fmt: skip
def test_a_damaged_correction_is_refused_whole(wrong):
    params = small_model(torch.bfloat16)
    optimizer = make(params, master_weight_bits=24)
    train(optimizer, params, 2)
    before, damaged = snapshot(optimizer), optimizer.state_dict()
    damaged["state"][0] = {**damaged["state"][0], "weight_correction": wrong}
    with pytest.raises(ValueError, match="weight_correction"):
        optimizer.load_state_dict(damaged)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("what", ["shape", "dtype", "weights"])
def test_a_correction_that_does_not_fit_is_refused_before_a_step(what: str):
    params = small_model(torch.bfloat16)
    optimizer = make(params, master_weight_bits=24)
    train(optimizer, params, 1)
    p = params["embed"]
    if what == "weights":
        p.data = p.data.float()
    else:
        wrong = {"shape": torch.zeros(3, dtype=torch.int8), "dtype": torch.zeros(19, 5)}[what]
        optimizer.state[p]["weight_correction"] = wrong
    p.grad = torch.ones_like(p)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="weight_correction"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_a_new_stage_keeps_them():
    """Corrections belong to the weights, not to the statistics that carry_importance replaces."""
    params = small_model(torch.bfloat16)
    optimizer = make(params, master_weight_bits=32)
    train(optimizer, params, 3)
    weights = {p: optimizer.master_weight(p) for p in params.values()}
    optimizer.carry_importance(optimizer.state_dict())
    for p, weight in weights.items():
        assert torch.equal(optimizer.master_weight(p), weight)
        assert not torch.equal(weight, p.float())


@pytest.mark.parametrize("bits", BITS)
def test_the_next_stage_takes_them_along(bits: int):
    """The weights go on, so their low bits do; an optimizer's own come first."""
    params = small_model(torch.bfloat16)
    first = make(params, master_weight_bits=bits)
    train(first, params, 3)
    second = make(params, master_weight_bits=bits)
    second.carry_importance(first)
    for p in params.values():
        assert torch.equal(second.master_weight(p), first.master_weight(p))
    train(second, params, 1)
    own = {p: second.master_weight(p) for p in params.values()}
    second.carry_importance(first.state_dict())
    assert all(torch.equal(second.master_weight(p), weight) for p, weight in own.items())

    damaged = first.state_dict()
    damaged["state"][0] = {**damaged["state"][0], "weight_correction": torch.zeros(3, dtype=torch.int8)}
    third = make(params, master_weight_bits=bits)
    with pytest.raises(ValueError, match="weight_correction"):
        third.carry_importance(damaged)
    assert not third.state


@pytest.mark.parametrize("key", ["weight_correction", "exp_avg", "isolation_mask"])
@pytest.mark.parametrize("value", [None, [1]])
def test_state_that_is_no_tensor_is_refused(key: str, value):
    params = small_model(torch.bfloat16)
    optimizer = make(params, master_weight_bits=24)
    train(optimizer, params, 1)
    optimizer.state[params["embed"]][key] = value
    weights = [p.detach().clone() for p in params.values()]
    with pytest.raises(RuntimeError, match=key):
        train(optimizer, params, 1)
    assert all(map(torch.equal, weights, params.values()))


def test_two_runs_and_a_strided_parameter():
    runs = []
    for _ in range(2):
        params = {"w": torch.nn.Parameter(bf16(40, 30).detach().t())}
        optimizer = make(params, master_weight_bits=24)
        train(optimizer, params, 4)
        assert optimizer.state[params["w"]]["weight_correction"].is_contiguous()
        runs.append(optimizer)
    assert_same_run(*runs)


def test_other_weights_have_none():
    for dtype in (torch.float32, torch.float64):
        params = small_model(dtype)
        optimizer = make(params, master_weight_bits=24)
        train(optimizer, params, 1)
        for p in params.values():
            assert "weight_correction" not in optimizer.state[p]
            weight = optimizer.master_weight(p)
            assert weight.dtype == dtype and torch.equal(weight, p) and weight.data_ptr() != p.data_ptr()
    with pytest.raises(ValueError, match="group"):
        optimizer.master_weight(torch.nn.Parameter(torch.ones(3)))
