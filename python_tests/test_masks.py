"""Masks set by hand: static, until the next refresh, or persistent; what they protect and what they do not."""

from __future__ import annotations

import warnings

import pytest
import torch

from python_tests.cases import LAYOUTS, SHAPES, lay_out
from python_tests.harness import give_gradients, make, small_model, tensor_bytes, train


def half_of(p: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.rand(p.shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mask_comes_back_as_set_and_is_packed(name: str, layout: str):
    """Logical row-major whatever the strides, least significant bit first, padding 0."""
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(1)
    p = torch.nn.Parameter(lay_out(torch.randn(shape, generator=generator).numpy(), "float32", layout)[0])
    mask = lay_out((torch.rand(shape, generator=generator) < 0.5).float().numpy(), "float32", layout)[
        0
    ].bool()
    optimizer = make({"w": p}, mask_interval=None)
    optimizer.set_isolation_mask(p, mask)
    back = optimizer.isolation_mask(p)
    assert back.dtype == torch.bool and back.shape == p.shape and torch.equal(back, mask)
    flat = mask.reshape(-1).tolist()
    expected = [sum(bit << i for i, bit in enumerate(flat[at : at + 8])) for at in range(0, len(flat), 8)]
    packed = optimizer.state[p]["isolation_mask"]
    assert packed.dtype == torch.uint8 and packed.tolist() == expected


def test_isolation_mask_is_a_copy():
    params = small_model()
    optimizer = make(params, mask_interval=None)
    p = params["embed"]
    given = half_of(p)
    optimizer.set_isolation_mask(p, given)
    expected = given.clone()
    given.fill_(True)
    optimizer.isolation_mask(p).fill_(True)
    assert torch.equal(optimizer.isolation_mask(p), expected)


def test_no_mask_reads_as_all_false():
    params = small_model()
    for ratio in (0.0, 0.5):
        optimizer = make(params, isolation_ratio=ratio)
        for p in params.values():
            assert optimizer.isolation_mask(p).shape == p.shape and not optimizer.isolation_mask(p).any()
        assert len(optimizer.state) == 0  # asking creates nothing


def test_static_mask_stays_without_an_interval():
    params = small_model()
    optimizer = make(params, mask_interval=None)
    masks = {name: half_of(p) for name, p in params.items()}
    for name, mask in masks.items():
        optimizer.set_isolation_mask(params[name], mask)
    before = {name: p.detach().clone() for name, p in params.items()}
    train(optimizer, params, 10)
    assert optimizer.isolation_report() is None
    for name, p in params.items():
        assert torch.equal(p == before[name], masks[name]), name
        assert torch.equal(optimizer.isolation_mask(p), masks[name])


def test_mask_set_by_hand_lasts_until_the_next_refresh():
    params, untouched = small_model(), small_model()
    optimizer, plain = make(params, mask_interval=3), make(untouched, mask_interval=3)
    train(optimizer, params, 1)
    train(plain, untouched, 1)
    optimizer.set_isolation_mask(params["embed"], half_of(params["embed"]))
    kept = params["embed"].detach()[half_of(params["embed"])]
    train(optimizer, params, range(1, 3))
    train(plain, untouched, range(1, 3))
    assert torch.equal(params["embed"].detach()[half_of(params["embed"])], kept)
    # The statistics went on as if nothing were isolated, so the refresh selects what it would have selected.
    for name in params:
        a, b = optimizer.isolation_mask(params[name]), plain.isolation_mask(untouched[name])
        assert torch.equal(a, b)
    released = optimizer.isolation_report().released
    assert released == int((half_of(params["embed"]) & ~optimizer.isolation_mask(params["embed"])).sum())


@pytest.mark.parametrize("ratio", [0.0, 0.2])
@pytest.mark.parametrize("isolate", [True, False])
def test_persistent_mask_survives_refreshes(ratio: float, isolate: bool):
    """With ratio 0 and isolate=False too."""
    from epi_kernels import MaskedEMAAdamW

    params = small_model()
    groups = [
        {"params": [("embed", params["embed"])], "isolate": isolate},
        {"params": [(name, p) for name, p in params.items() if name != "embed"]},
    ]
    optimizer = MaskedEMAAdamW(groups, lr=0.1, isolation_ratio=ratio, mask_interval=2, backend="reference")
    mask = half_of(params["embed"])
    optimizer.set_isolation_mask(params["embed"], mask, persistent=True)
    assert torch.equal(optimizer.isolation_mask(params["embed"]), mask)  # at once, not from the refresh on
    before = params["embed"].detach().clone()
    train(optimizer, params, 5)
    assert torch.equal(params["embed"].detach()[mask], before[mask])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ratio 0 selects nothing
        report = optimizer.refresh_isolation_mask()
    now = optimizer.isolation_mask(params["embed"])
    assert now[mask].all() and (isolate and ratio > 0 or torch.equal(now, mask))
    eligible = sum(p.numel() for name, p in params.items() if isolate or name != "embed")
    selected = report.isolated - int(mask.sum())
    # Beside k and not out of it: an element may be both selected and persistent, never fewer than k are selected.
    assert selected <= int(ratio * eligible) <= selected + int(mask.sum())
    train(optimizer, params, range(5, 9))
    assert torch.equal(params["embed"].detach()[mask], before[mask])
    assert "persistent_mask" in optimizer.state[params["embed"]]
    assert all("persistent_mask" not in optimizer.state[params[n]] for n in ("block.bias", "scale"))


def test_persistent_bits_are_beside_k():
    """Persistent elements that would not be selected leave the selection as it was."""
    masks = []
    for persistent in (False, True):
        p = torch.nn.Parameter(torch.ones(20))
        p.grad = torch.arange(20.0)
        optimizer = make({"w": p}, isolation_ratio=0.25, mask_interval=None)
        if persistent:
            low = torch.arange(20) < 3
            optimizer.set_isolation_mask(p, low, persistent=True)
        optimizer.step()
        report = optimizer.refresh_isolation_mask()
        masks.append(optimizer.isolation_mask(p))
        assert (report.isolated, report.entered) == ((8, 5) if persistent else (5, 5))
        assert report.jaccard == (3 / 8 if persistent else 0.0)
    assert torch.equal(masks[0] | (torch.arange(20) < 3), masks[1])


def test_refresh_releases_a_passing_mask_of_a_group_that_does_not_isolate():
    from epi_kernels import MaskedEMAAdamW

    params = small_model()
    groups = [
        {"params": [("embed", params["embed"])], "isolate": False},
        {"params": [("block.bias", params["block.bias"])]},
    ]
    optimizer = MaskedEMAAdamW(groups, isolation_ratio=0.5, mask_interval=2, backend="reference")
    mask = half_of(params["embed"])
    optimizer.set_isolation_mask(params["embed"], mask)
    train(optimizer, params, 2)
    assert not optimizer.isolation_mask(params["embed"]).any()
    assert optimizer.isolation_report().released == int(mask.sum())


def test_no_automatic_refresh_with_ratio_zero():
    params = small_model()
    optimizer = make(params, isolation_ratio=0.0, mask_interval=1)
    mask = half_of(params["embed"])
    optimizer.set_isolation_mask(params["embed"], mask)
    train(optimizer, params, 4)
    assert optimizer.isolation_report() is None
    assert torch.equal(optimizer.isolation_mask(params["embed"]), mask)


def test_set_mask_before_the_first_step_changes_only_what_it_isolates():
    a, b = small_model(), small_model()
    optimizer, plain = make(a, mask_interval=None), make(b, mask_interval=None)
    mask = half_of(a["embed"])
    optimizer.set_isolation_mask(a["embed"], mask)
    train(optimizer, a, 3)
    train(plain, b, 3)
    assert torch.equal(a["embed"][~mask], b["embed"][~mask])
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(optimizer.state[a["embed"]][key], plain.state[b["embed"]][key]), key
    assert all(tensor_bytes(a[n]) == tensor_bytes(b[n]) for n in ("block.weight", "block.bias", "scale"))


def test_isolated_elements_keep_their_statistics_moving():
    params = small_model()
    optimizer = make(params, mask_interval=None)
    for p in params.values():
        optimizer.set_isolation_mask(p, torch.ones(p.shape, dtype=torch.bool))
    give_gradients(params, 0)
    optimizer.step()
    for p in params.values():
        state = optimizer.state[p]
        assert (state["exp_avg"] != 0).all() and (state["exp_avg_sq"] != 0).all()
        assert optimizer.isolation_mask(p).all()
