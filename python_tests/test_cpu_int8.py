"""States of 8 and of 4 bits on the cpu backend: the reference's bits on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch

from epi_kernels.backends.cpu import CpuBackend
from epi_kernels.reference import codec
from epi_kernels.reference.stats import LayerStats, score_terms
from python_tests import stage_checks as checks

CODES = [pytest.param(checks.INT8, id="int8"), pytest.param(checks.INT4, id="int4")]
ISAS = ("avx512", "avx2", "plain")
TAILS = (1, 2, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 200, 511, 512, 513, 576, 1025, 4097)


@pytest.fixture(params=ISAS)
def backend(request) -> CpuBackend:
    try:
        return CpuBackend(request.param)
    except ImportError as reason:
        if request.param == "plain":
            raise
        pytest.skip(str(reason))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize(
    "dtypes", checks.DTYPES_INT8 + checks.DTYPES_INT4 + checks.DTYPES_CORRECTED, ids=checks.names
)
def test_step_and_its_stats(backend, dtypes, stochastic, shift):
    checks.check_step(backend, checks.CPU, dtypes, shift, stochastic)


def test_every_dtype_and_tail_in_one_call(backend):
    checks.check_tails(backend, checks.CPU, TAILS)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, 1e20])
@pytest.mark.parametrize("dtype", [checks.F32, checks.BF16], ids=["f32", "bf16"])
def test_a_gradient_that_is_not_finite_spoils_its_block_alone(backend, dtype, bad):
    checks.check_spoiled_block(backend, checks.CPU, dtype, bad)


def test_magnitudes_from_subnormal_to_beyond_the_code(backend):
    checks.check_magnitudes(backend, checks.CPU)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("domains", [1, 3])
@pytest.mark.parametrize(("normalization", "factor"), checks.NORMALIZATIONS)
@pytest.mark.parametrize("dtype", CODES)
def test_refresh_stages(backend, dtype, normalization, factor, domains, shift):
    checks.check_refresh(backend, checks.CPU, dtype, shift, normalization, factor, domains)


@pytest.mark.parametrize("stride", [1, 2, 3, 64])
@pytest.mark.parametrize("dtype", CODES)
def test_sampled_counts(backend, dtype, stride):
    checks.check_sampled_counts(backend, checks.CPU, stride, 0, dtype=dtype)


@pytest.mark.parametrize("domains", [1, 2])
@pytest.mark.parametrize(
    ("normalization", "keep_factor"), [("minmax", 1.0), ("none", checks.KEEP), ("zscore", 1.0)]
)
def test_the_search_in_cpp_finds_what_the_reference_finds(backend, normalization, keep_factor, domains):
    """Large enough for samples, with many ties: codes have few values."""
    tensors = checks.params((200_000, 70_001), checks.F32, checks.INT8, None)
    for row, t in enumerate(tensors):
        t.layer = row
        t.isolation_mask = torch.randint(0, 256, ((t.param.numel() + 7) // 8,), dtype=torch.uint8)
        t.exp_avg_sq_scale[3] = codec.NONFINITE
        t.exp_avg_sq[192:256] = 255
    stats = LayerStats.empty(2, checks.CPU, with_moments=True)
    checks.REFERENCE.accumulate(tensors, stats)
    n = torch.tensor([200_000, 70_001])
    terms = score_terms(stats, n, normalization)
    floor, end = checks.selection.key_range(normalization, keep_factor)
    k = [int(n.sum()) // 50] if domains == 1 else [2000, 700]
    problem = checks.search_problem(
        k,
        [0, 0] if domains == 1 else [0, 1],
        floor=floor,
        end=end,
        bin_bits=checks.selection.bin_bits(domains),
        keep_factor=keep_factor,
        n_elements=[int(n.sum())] if domains == 1 else n.tolist(),
    )
    search = checks.KthSearch.start(problem)
    while not bool(search.done.all()):
        search.histogram.zero_()
        checks.REFERENCE.count(tensors, terms, search)
        search.select()
    threshold, count_ge = backend.find_thresholds(tensors, terms, problem)
    assert torch.equal(threshold, search.threshold) and torch.equal(count_ge, search.count_ge)
