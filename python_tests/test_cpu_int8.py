"""8-bit states on the cpu backend: codes and scales of the reference, with every instruction set."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

from epi_kernels.backends import cpu
from epi_kernels.policies import selection
from epi_kernels.reference import bits, codec
from epi_kernels.reference.stats import LayerStats, ScoreTerms, score
from epi_kernels.reference.tensors import ParamTensors
from epi_kernels.reference.threshold import KthSearch, score_keys
from python_tests import stage_checks
from python_tests.stage_checks import BF16, CPU, DTYPES_INT8, F32, INT8, NORMALIZATIONS, REFERENCE
from python_tests.test_cpu_backend import _isas

# around a block and around what the step takes at once; the last crosses a task's end
SIZES = (1, 7, 63, 64, 65, 511, 513, 4099, 32768 + 70)


@pytest.fixture(params=_isas())
def backend(request) -> cpu.CpuBackend:
    return cpu.CpuBackend(request.param)


def step_both(backend: cpu.CpuBackend, items: list[ParamTensors], **options) -> list[ParamTensors]:
    """Steps ``items`` on the reference and a copy of them on the backend; the copy, which is equal."""
    ours = copy.deepcopy(items)
    for side, tensors in ((backend, ours), (REFERENCE, items)):
        side.step(tensors, **{"stochastic_rounding": True, "grad_multiplier": None, "stats": None, **options})
    stage_checks.assert_same(ours, items)
    return ours


# --- step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stochastic_rounding", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtypes", DTYPES_INT8, ids=stage_checks.names)
def test_step_gives_the_reference_bits(backend, dtypes, shift, stochastic_rounding):
    stage_checks.check_step(backend, CPU, dtypes, shift, stochastic_rounding)


@pytest.mark.parametrize("stochastic_rounding", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES_INT8, ids=stage_checks.names)
def test_step_at_every_size(backend, dtypes, stochastic_rounding):
    step_both(backend, stage_checks.params(SIZES, *dtypes), stochastic_rounding=stochastic_rounding)


def test_every_combination_in_one_call(backend):
    dtypes = stage_checks.DTYPES + DTYPES_INT8
    step_both(backend, [t for one in dtypes for t in stage_checks.params((9, 4097), *one)])


def test_zeros_stay_zero_bytes(backend):
    (t,) = stage_checks.params((200,), F32, INT8, INT8)
    t.grad = torch.zeros(200)
    for codes in (t.exp_avg, t.exp_avg_sq, t.importance, t.exp_avg_scale, t.exp_avg_sq_scale):
        codes.zero_()
    t.importance_scale.zero_()
    (after,) = step_both(backend, [t])
    assert not after.exp_avg.any() and not after.exp_avg_sq.any() and not after.importance_scale.any()


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf, 1e25])
@pytest.mark.parametrize("dtypes", DTYPES_INT8, ids=stage_checks.names)
def test_a_gradient_that_is_not_finite_poisons_its_block_alone(backend, dtypes, bad):
    """1e25: the square alone overflows. Two steps: what is read back is not finite either."""
    items = stage_checks.params((300, 65), *dtypes)
    for t, where in zip(items, (130, 64), strict=True):
        t.grad[where] = bad
    for _ in range(2):
        items = step_both(backend, items)
    for t, poisoned in zip(items, (2, 1), strict=True):
        scales = t.u_scale if t.u_scale is not None else t.exp_avg_sq_scale
        assert (scales == codec.NONFINITE).nonzero().flatten().tolist() == [poisoned]


@pytest.mark.parametrize("dtypes", DTYPES_INT8, ids=stage_checks.names)
def test_values_of_every_magnitude(backend, dtypes):
    """Blocks from subnormal numbers up to overflow, spread over forty binades or alike."""
    generator = torch.Generator().manual_seed(4)
    items = []
    for spread in (0, 3, 12):
        for t in stage_checks.params((64 * 80 + 9,), *dtypes):
            n = t.grad.numel()
            exponent = torch.linspace(-44, 37, n // 64 + 1).repeat_interleave(64)[:n].double()
            exponent -= spread * torch.rand(n, generator=generator).double()
            t.grad = (torch.randn(n, generator=generator) * 10.0**exponent).to(t.grad.dtype)
            items.append(t)
    for _ in range(3):
        items = step_both(backend, items)


def test_a_shard_draws_what_the_whole_draws(backend):
    (whole,) = stage_checks.params((4096,), BF16, INT8, INT8)
    shard, start = copy.deepcopy(whole), 1024
    for name in ("param", "grad", "exp_avg", "exp_avg_sq", "importance"):
        setattr(shard, name, getattr(shard, name)[start:])
    for name in ("exp_avg_scale", "exp_avg_sq_scale", "importance_scale"):
        setattr(shard, name, getattr(shard, name)[start // codec.BLOCK :])
    shard.index_offset = start
    step_both(backend, [whole]), step_both(backend, [shard])
    assert torch.equal(whole.param[start:], shard.param) and torch.equal(whole.exp_avg[start:], shard.exp_avg)


@pytest.mark.parametrize("offset", [(1 << 32) - 64, (1 << 32) - 640, 1 << 32, (5 << 32) + 128])
def test_random_bits_follow_the_logical_index(backend, offset):
    items = stage_checks.params((3, 64, 1500), BF16, INT8, INT8)
    for t in items:
        t.index_offset = offset
    step_both(backend, items)


def test_a_row_without_its_scales_is_refused(backend):
    (t,) = stage_checks.params((64,), F32, INT8, None)
    t.exp_avg_sq_scale = None
    with pytest.raises(RuntimeError, match="lacks a tensor"):
        backend.step([t], stochastic_rounding=False, grad_multiplier=None, stats=None)


# --- refresh ------------------------------------------------------------------------------------


@pytest.mark.parametrize("domains", [1, 3])
@pytest.mark.parametrize("normalization,factor", NORMALIZATIONS)
@pytest.mark.parametrize("shift", [0, 1])
def test_refresh_gives_the_reference_bits(backend, shift, normalization, factor, domains):
    stage_checks.check_refresh(backend, CPU, INT8, shift, normalization, factor, domains)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("with_moments", [False, True])
def test_stats_alone_and_in_the_step(backend, with_moments, own):
    items = stage_checks.params(SIZES, BF16, INT8, INT8 if own else None)
    items[-1].grad[100] = math.nan
    stats = [LayerStats.empty(3, CPU, with_moments=with_moments) for _ in range(3)]
    ours = copy.deepcopy(items)
    for side, tensors, into in ((backend, ours, stats[0]), (REFERENCE, items, stats[1])):
        side.step(tensors, stochastic_rounding=True, grad_multiplier=None, stats=into)
    stage_checks.assert_same_stats(stats[0], stats[1])
    backend.accumulate([t for t in ours if t.layer >= 0], stats[2])
    stage_checks.assert_same_stats(stats[2], stats[0])
    assert torch.equal(stats[2].moments, stats[0].moments)


@pytest.mark.parametrize("stride", [2, 7])
def test_sampled_counts(backend, stride):
    items = stage_checks.refresh_params(INT8, 0)
    terms = ScoreTerms(torch.tensor([0.0, 0.1, 0.0]), torch.tensor([1.0, 2.0, 0.0]), positive_only=True)
    problem = stage_checks.search_problem(
        [50, 0], [0, 1, 0], floor=2**31, end=2**32, bin_bits=8, keep_factor=0.5
    )
    expected, actual = KthSearch.start(problem), KthSearch.start(problem)
    REFERENCE.count(items, terms, expected, stride)
    backend.count(items, terms, actual, stride)
    assert int(expected.histogram.sum()) > 0
    assert torch.equal(expected.histogram, actual.histogram)


@pytest.mark.parametrize("shift,scale", [(0.0, 1.0), (1e-3, 1e-20), (1e-30, 3e-30), (0.1, 0.0), (0.5, 3e38)])
def test_bounds_on_codes_are_exact_at_every_neighbour(backend, shift, scale):
    """Brackets and thresholds around the scores of single codes, under scales from end to end."""
    codes = torch.tensor([0, 16, 17, 31, 32, 100, 254, 255] * 8, dtype=torch.uint8)
    scales = torch.tensor([0, 1, 5, 60, 93, 102, 103, 104, 140, 229, 230, codec.NONFINITE], dtype=torch.uint8)
    codes = codes.repeat(len(scales))
    codes[-64:] = 255
    mask = bits.pack(torch.arange(codes.numel()) % 3 == 0)
    item = ParamTensors(codes, None, codes, codes, None, mask, None, exp_avg_sq_scale=scales)
    u = item.read_u(0, codes.numel())
    for positive_only, keep_factor in ((True, 1.0), (True, selection.keep_factor(0.3)), (False, 1.0)):
        terms = ScoreTerms(torch.tensor([shift]), torch.tensor([scale]), positive_only)
        scores = score(u[u.isfinite()].unique(), terms.shift[0], terms.scale[0], None, 1.0)
        scores = scores[scores.isfinite()] + 0.0
        for key, width in itertools.product(score_keys(scores).tolist(), (0, 1)):
            problem = stage_checks.search_problem(
                [5], [0], floor=max(key - width, 0), end=key + 1 + width, bin_bits=8, keep_factor=keep_factor
            )
            expected, actual = KthSearch.start(problem), KthSearch.start(problem)
            REFERENCE.count([item], terms, expected)
            backend.count([item], terms, actual)
            assert torch.equal(expected.histogram, actual.histogram)
        for threshold in scores.tolist():
            results = []
            for side in (backend, REFERENCE):
                copies, drift = copy.deepcopy([item]), torch.zeros(1, 3, dtype=torch.int64)
                side.select(copies, terms, torch.tensor([threshold]), keep_factor, drift)
                results.append((copies[0].isolation_mask, drift))
            assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
