"""The cpu backend's refresh against the reference, bit for bit, with every instruction set this processor has."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from epi_kernels.backends.cpu import CpuBackend
from epi_kernels.reference.scalars import round_to_float32
from epi_kernels.reference.stats import LayerStats, ScoreTerms, score
from epi_kernels.reference.threshold import KEY_END, score_keys
from python_tests import cpu_items
from python_tests.cpu_items import (
    BF16,
    FP32,
    LARGE,
    REFERENCE,
    SMALL,
    assert_same,
    assert_same_stats,
    make_param,
    new_search,
    refresh_items,
    step_both,
    terms_of,
)

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(params=cpu_items.isas())
def backend(request) -> CpuBackend:
    return CpuBackend(request.param)


# --- refresh ------------------------------------------------------------------------------------


SEARCHES = {
    "global": ([600], [0, 0, 0, 0, 0]),
    "layer": ([300, 3, 20, 0, 1], [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize("specials", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_accumulate(backend, dtype, specials):
    items = refresh_items(dtype, specials=specials)
    for with_moments in (False, True):
        expected, actual = (
            LayerStats.empty(5, torch.device("cpu"), with_moments=with_moments) for _ in range(2)
        )
        for _ in range(2):  # merges into what is there
            REFERENCE.accumulate(items, expected)
            backend.accumulate(items, actual)
        assert_same_stats(expected, actual)


@pytest.mark.parametrize("keep_factor", [1.0, round_to_float32(0.8)])
@pytest.mark.parametrize("scope", SEARCHES)
@pytest.mark.parametrize("normalization", ["minmax", "zscore", "none"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_refresh_gives_the_reference_bits(backend, dtype, normalization, scope, keep_factor):
    """Sample, bracket, every counting pass and the mask, histograms compared after each."""
    if normalization == "zscore" and keep_factor != 1.0:
        return  # refused by the optimizer
    items = refresh_items(dtype, specials=True, persistent="random")
    terms = terms_of(items, normalization)
    k, domain = SEARCHES[scope]
    search = new_search(k, domain, terms, keep_factor)
    elements = torch.zeros(len(k), dtype=torch.int64)
    for item in items:
        elements[domain[item.layer]] += item.u.numel()
    for attempt in range(12):
        stride = 4 if attempt == 0 else 1
        expected, actual = copy.deepcopy(search), copy.deepcopy(search)
        expected.histogram.zero_(), actual.histogram.zero_()
        REFERENCE.count(items, terms, expected, stride)
        backend.count(items, terms, actual, stride)
        assert_same(expected, actual, f"pass {attempt}")
        search = actual
        search.bracket_from_sample(elements) if attempt == 0 else search.select()
        if bool(search.done.all()):
            break
    assert bool(search.done.all())
    for thresholds in (search.threshold[domain], torch.full((5,), -torch.inf), torch.zeros(5)):
        compare_select(backend, items, terms, thresholds, keep_factor)


def compare_select(backend, items, terms, thresholds, keep_factor) -> None:
    results = []
    for runner in (REFERENCE, backend):
        copies, drift = copy.deepcopy(items), torch.full((len(thresholds), 3), 11)
        runner.select(copies, terms, thresholds, keep_factor, drift)
        results.append((copies, drift))
    assert_same(*results)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("n", SMALL + LARGE)
def test_select_writes_whole_words(backend, n, dtype):
    masks = list(itertools.product(("none", "random", "full"), ("empty", "random", "full")))
    terms = ScoreTerms(torch.zeros(5), torch.ones(5), positive_only=True)
    for persistent, mask in masks if n in SMALL else masks[4:5]:
        item = make_param(n, state=dtype, mask=mask, persistent=persistent, unaligned=n % 2 == 1)
        for threshold in (1e-9, torch.inf):
            compare_select(backend, [item], terms, torch.full((5,), threshold), 1.0)


def neighbours(dtype: torch.dtype) -> torch.Tensor:
    """Runs of eleven values an ulp apart, of either sign, and the values that are no number."""
    around = torch.tensor([1e-45, 1e-30, 2e-30, 1e-3, 0.1, 0.5, 3e38])
    bits_type = torch.int32 if dtype == FP32 else torch.int16
    words = around.to(dtype).view(bits_type).view(-1, 1) + torch.arange(-5, 6, dtype=bits_type)
    u = words.clamp_min(0).view(dtype).reshape(-1)
    return torch.cat(
        [u, -u, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan]).to(dtype)]
    )


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shift,scale", [(0.0, 1.0), (1e-3, 1e-40), (1e-30, 3e-30), (0.1, 0.0), (0.5, 3e38)])
def test_bounds_on_u_are_exact_at_every_neighbour(backend, dtype, shift, scale):
    """Brackets around the scores of single floats: one ulp of u decides between counted and skipped."""
    u = neighbours(dtype)
    item = make_param(u.numel(), state=dtype, mask="random")
    item.exp_avg_sq = u
    for positive_only, keep_factor in ((True, 1.0), (True, round_to_float32(0.7)), (False, 1.0)):
        terms = ScoreTerms(torch.tensor([shift]), torch.tensor([scale]), positive_only)
        scores = score(u[u.isfinite()].float(), terms.shift[0], terms.scale[0], None, 1.0)[5::11]
        for key, width in itertools.product(score_keys(scores).tolist(), (1, 40000)):
            search = new_search([5], [0], terms, keep_factor)
            search.lo.fill_(max(key - width, 0))
            search.hi.fill_(min(key + width, KEY_END))
            search._fit_bins()
            expected, actual = copy.deepcopy(search), copy.deepcopy(search)
            REFERENCE.count([item], terms, expected)
            backend.count([item], terms, actual)
            assert_same(expected, actual)
        for threshold in scores.tolist():
            compare_select(backend, [item], terms, torch.tensor([threshold]), keep_factor)


@pytest.mark.parametrize("n", [(1 << 21) + 13])
def test_a_tensor_large_enough_for_larger_tasks(backend, n):
    item = make_param(n, BF16, BF16, layer=0)
    step_both(backend, [item], layers=1, with_moments=True)
    terms = ScoreTerms(torch.zeros(1), torch.ones(1), positive_only=True)
    compare_select(backend, [item], terms, torch.tensor([1e-9]), 1.0)
    search = new_search([n // 100], [0], terms, 1.0)
    expected, actual = copy.deepcopy(search), copy.deepcopy(search)
    for stride in (7, 1):
        REFERENCE.count([item], terms, expected, stride)
        backend.count([item], terms, actual, stride)
    assert_same(expected, actual)
