"""Stats, threshold and mask on the Triton backend give the reference's bits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from epi_kernels.reference import bits
from epi_kernels.reference.stats import LayerStats, score_terms
from epi_kernels.reference.threshold import KEY_END, KthSearch
from python_tests.harness import need_triton
from python_tests.stage_checks import search_problem
from python_tests.triton_stages import (
    BF16,
    BLOCK,
    CHUNK,
    DEVICE,
    F32,
    REFERENCE,
    Spec,
    assert_same,
    backend,
    make,
    on_device,
    same_bits,
    stats_on_device,
)

need_triton()

# several layers and chunks, both dtypes, own importances, layers without any spread, special values
SPECS = (
    Spec(2 * CHUNK + 13, layer=0, persistent=0.02),
    Spec(CHUNK + 1, BF16, BF16, layer=1, u_values=(math.inf, math.nan, -math.inf)),
    Spec(BLOCK - 1, F32, F32, BF16, layer=1, offset=1),
    Spec(77, F32, BF16, F32, layer=2, u_values=(0.0,) * 30),
    Spec(0, layer=2),
    Spec(20, layer=3, u_values=(2e-5,) * 20),  # all equal: never isolated
    Spec(9, layer=4, u_values=(math.nan,) * 9, persistent=0.5),
    Spec(1, layer=5, persistent=1.0, isolated=0.0),
)
LAYERS = 6


def collect(items, *, with_moments: bool) -> LayerStats:
    stats = LayerStats.empty(LAYERS, torch.device("cpu"), with_moments=with_moments)
    REFERENCE.accumulate(items, stats)
    return stats


def terms_of(items, normalization: str):
    sizes = torch.zeros(LAYERS, dtype=torch.int64)
    for item in items:
        sizes[item.layer] += item.u.numel()
    return score_terms(collect(items, with_moments=normalization == "zscore"), sizes, normalization)


def moved(terms):
    return replace(terms, shift=terms.shift.to(DEVICE), scale=terms.scale.to(DEVICE))


def search(k, domain, *, keep_factor: float, bin_bits: int, signed: bool, device) -> KthSearch:
    floor = 0 if signed else 1 << 31
    return KthSearch.start(
        search_problem(
            k, domain, floor=floor, end=KEY_END, bin_bits=bin_bits, keep_factor=keep_factor, device=device
        )
    )


@pytest.mark.parametrize("with_moments", [False, True], ids=["minmax", "zscore"])
def test_stats(with_moments):
    items = make(*SPECS)
    expected = collect(items, with_moments=with_moments)
    actual = stats_on_device(LayerStats.empty(LAYERS, torch.device("cpu"), with_moments=with_moments))
    backend().accumulate(on_device(items, SPECS), actual)
    for name in ("minimum", "maximum", "nonfinite"):
        same_bits(getattr(actual, name), getattr(expected, name), name)
    torch.testing.assert_close(actual.moments.cpu(), expected.moments, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("normalization", "hysteresis", "scope", "bin_bits"),
    [
        ("minmax", 0.0, "global", 11),
        ("minmax", 0.3, "global", 8),
        ("minmax", 0.3, "layer", 8),
        ("none", 0.0, "layer", 11),
        ("none", 0.5, "global", 8),
        ("zscore", 0.0, "global", 11),
        ("zscore", 0.0, "layer", 8),
    ],
)
def test_a_whole_search_and_its_masks(normalization, hysteresis, scope, bin_bits):
    items = make(*SPECS)
    on_gpu = on_device(items, SPECS)
    terms = terms_of(items, normalization)
    domain = list(range(LAYERS)) if scope == "layer" else [0] * LAYERS
    k = [100, 60, 9, 0, 3, 1] if scope == "layer" else [250]
    keep = torch.tensor(1.0 - hysteresis).item()
    options = {"keep_factor": keep, "bin_bits": bin_bits, "signed": normalization == "zscore"}
    expected = search(k, domain, device="cpu", **options)
    actual = search(k, domain, device=DEVICE, **options)
    sizes = torch.zeros(len(k), dtype=torch.int64)
    for item in items:
        sizes[domain[item.layer]] += item.u.numel()

    for turn in range(10):
        stride = 3 if turn == 0 else 1
        expected.histogram.zero_()
        actual.histogram.zero_()
        REFERENCE.count(items, terms, expected, stride)
        backend().count(on_gpu, moved(terms), actual, stride)
        same_bits(actual.histogram, expected.histogram, f"histogram {turn}")
        if turn == 0:
            expected.bracket_from_sample(sizes)
            actual.bracket_from_sample(sizes.to(DEVICE))
        else:
            expected.select()
            actual.select()
        if bool(expected.done.all()):
            break
    assert bool(expected.done.all())

    drift = torch.zeros(LAYERS, 3, dtype=torch.int64)
    drift_actual = drift.to(DEVICE)
    thresholds = expected.threshold[expected.domain]
    REFERENCE.select(items, terms, thresholds, keep, drift)
    backend().select(on_gpu, moved(terms), thresholds.to(DEVICE), keep, drift_actual)
    assert_same(on_gpu, items)
    same_bits(drift_actual, drift, "drift")
    assert drift[:, 0].sum() > 0


@pytest.mark.parametrize("stride", [1, 2, 7, 1000])
def test_sampling_counts_every_nth_run(stride):
    specs = tuple(Spec(n, isolated=0.5) for n in (1, 63, 64, 65, 64 * stride + 1, CHUNK * 2 + 65))
    items = make(*specs)
    terms = terms_of(items, "minmax")
    for keep_factor in (1.0, 0.75):
        options = {"keep_factor": keep_factor, "bin_bits": 11, "signed": False}
        expected = search([1], [0] * LAYERS, device="cpu", **options)
        actual = search([1], [0] * LAYERS, device=DEVICE, **options)
        REFERENCE.count(items, terms, expected, stride)
        backend().count(on_device(items, specs), moved(terms), actual, stride)
        same_bits(actual.histogram, expected.histogram, "histogram")


def test_a_narrow_bracket_takes_the_path_for_few_elements():
    spec = Spec(4 * BLOCK, layer=0)
    items = make(spec)
    terms = terms_of(items, "none")
    expected = search([5], [0] * LAYERS, keep_factor=1.0, bin_bits=8, signed=False, device="cpu")
    values = items[0].u.sort().values
    from epi_kernels.reference.threshold import score_keys

    expected.lo = score_keys(values[-9:-8])
    expected.hi = score_keys(values[-2:-1])
    expected._fit_bins()
    actual = search([5], [0] * LAYERS, keep_factor=1.0, bin_bits=8, signed=False, device=DEVICE)
    actual.lo, actual.hi = expected.lo.to(DEVICE), expected.hi.to(DEVICE)
    actual._fit_bins()
    REFERENCE.count(items, terms, expected)
    backend().count(on_device(items, (spec,)), moved(terms), actual)
    same_bits(actual.histogram, expected.histogram, "histogram")
    assert expected.histogram[0, -1] == 2 and expected.histogram[0, :-1].sum() == 7


def test_nothing_is_isolated_by_an_infinite_threshold_but_persistent_bits_stay():
    items = make(*SPECS)
    on_gpu = on_device(items, SPECS)
    terms = terms_of(items, "minmax")
    thresholds = torch.full((LAYERS,), math.inf)
    drift = torch.zeros(LAYERS, 3, dtype=torch.int64)
    drift_actual = drift.to(DEVICE)
    REFERENCE.select(items, terms, thresholds, 1.0, drift)
    backend().select(on_gpu, moved(terms), thresholds.to(DEVICE), 1.0, drift_actual)
    assert_same(on_gpu, items)
    same_bits(drift_actual, drift, "drift")
    for item, spec in zip(on_gpu, SPECS, strict=True):
        wanted = torch.zeros(spec.n, dtype=torch.bool)
        if item.persistent_mask is not None:
            wanted = bits.unpack(item.persistent_mask.cpu(), spec.n)
        assert torch.equal(bits.unpack(item.isolation_mask.cpu(), spec.n), wanted)


def test_ties_at_the_threshold_are_all_isolated_and_padding_stays_zero():
    spec = Spec(BLOCK + 3, isolated=0.0, u_values=(1e-3,) * (BLOCK + 3))
    items = make(spec)
    items[0].exp_avg_sq[:5] = torch.tensor([0.0, 2e-3, 5e-4, 2e-3, -1e-3])
    on_gpu = on_device(items, (spec,))
    terms = terms_of(items, "none")
    drift = torch.zeros(LAYERS, 3, dtype=torch.int64, device=DEVICE)
    thresholds = torch.full((LAYERS,), torch.tensor(1e-3).item(), device=DEVICE)
    backend().select(on_gpu, moved(terms), thresholds, 1.0, drift)
    chosen = bits.unpack(on_gpu[0].isolation_mask.cpu(), spec.n)
    assert chosen.nonzero().view(-1).tolist() == [1, 3, *range(5, spec.n)]
    assert on_gpu[0].isolation_mask[-1].item() == 0b111
    assert drift[0].tolist() == [spec.n - 3, spec.n - 3, 0]
