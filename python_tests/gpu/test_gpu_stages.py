"""Each stage on the device beside the reference on the CPU, bit for bit, aligned and off by one element."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from epi_kernels.reference.stats import LayerStats
from python_tests import stage_checks as checks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    "dtypes",
    checks.DTYPES + checks.DTYPES_INT8 + checks.DTYPES_INT4 + checks.DTYPES_CORRECTED,
    ids=checks.names,
)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_step_and_its_stats(dtypes, shift, stochastic, backend, device):
    checks.check_step(backend, device, dtypes, shift, stochastic)


def test_step_of_mixed_dtypes_in_one_call(backend, device):
    checks.check_mixed_step(backend, device)
    checks.check_tails(backend, device, (1, 17, 63, 64, 65, 4099))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    "dtype", [checks.F32, checks.BF16, checks.INT8, checks.INT4], ids=["f32", "bf16", "int8", "int4"]
)
@pytest.mark.parametrize(("normalization", "factor"), checks.NORMALIZATIONS)
@pytest.mark.parametrize("domains", [1, 3])
def test_refresh(domains, factor, normalization, dtype, shift, backend, device):
    checks.check_refresh(backend, device, dtype, shift, normalization, factor, domains)


def test_codes_from_subnormal_to_beyond_the_code(backend, device):
    """Decoding and encoding go through float32 subnormals on a GPU: flushed, they would be zeros."""
    checks.check_magnitudes(backend, device)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, 1e20], ids=["nan", "inf", "square"])
def test_a_gradient_that_is_not_finite_spoils_its_block_alone(bad, backend, device):
    checks.check_spoiled_block(backend, device, checks.BF16, bad)


@pytest.mark.parametrize("dtype", [checks.F32, checks.INT8, checks.INT4], ids=["f32", "int8", "int4"])
@pytest.mark.parametrize("stride", [1, 3, 64])
@pytest.mark.parametrize("shift", [0, 1])
def test_sampled_counts(stride, shift, dtype, backend, device):
    checks.check_sampled_counts(backend, device, stride, shift, dtype=dtype)


def test_two_runs_give_the_same_moments(backend, device):
    """zscore's sums: partials in a fixed order, so that a race would show."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(300_001, generator=generator).to(device)
    tensors = checks.copies(checks.params((300_001,), checks.F32, checks.F32, None), device)
    tensors[0].exp_avg_sq.copy_(u)
    runs = []
    for _ in range(3):
        stats = LayerStats.empty(1, device, with_moments=True)
        backend.accumulate(tensors, stats)
        runs.append(stats.moments)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_no_stage_waits_for_the_device(backend, device):
    """A read of a device value on the host would raise."""
    if device.type != "cuda":
        pytest.skip("a CPU has no stream to wait for")
    if backend.name == "reference":
        pytest.skip("the reference reads device values")
    from epi_kernels.reference.stats import ScoreTerms
    from epi_kernels.reference.threshold import KthSearch

    tensors = checks.copies(checks.refresh_params(checks.F32, 0), device)
    stats = LayerStats.empty(3, device, with_moments=True)
    terms = ScoreTerms(torch.zeros(3, device=device), torch.ones(3, device=device), positive_only=True)
    problem = checks.search_problem(
        [50], [0, 0, 0], floor=2**31, end=2**32, bin_bits=11, keep_factor=1.0, device=device
    )
    search = KthSearch.start(problem)
    scale, found_inf = torch.full((1,), 2.0, device=device), torch.zeros(1, device=device)
    drift = torch.zeros(3, 3, dtype=torch.int64, device=device)
    thresholds = torch.ones(3, device=device)

    def stages():
        checks.run_step(backend, tensors, stats=stats)
        checks.run_step(backend, tensors, grad_scale=scale, found_inf=found_inf)
        backend.accumulate(tensors, stats)
        backend.count(tensors, terms, search)
        backend.select(tensors, terms, thresholds, 1.0, drift)

    stages()  # compiles and loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stages()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream_is_honoured(backend, device):
    if device.type != "cuda":
        pytest.skip("a CPU has no streams")
    expected = checks.nonempty(checks.params(checks.SIZES, checks.F32, checks.F32, None))
    ours = checks.copies(expected, device)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for t in ours:  # late on this stream: a kernel on another one would not see it
            torch.cuda._sleep(1_000_000)
            t.grad.mul_(2.0)
        checks.run_step(backend, ours, stochastic_rounding=False)
    stream.synchronize()
    doubled = [dataclasses.replace(t, grad=t.grad * 2.0) for t in expected]
    checks.run_step(checks.REFERENCE, doubled, stochastic_rounding=False)
    checks.assert_same(ours, doubled)
