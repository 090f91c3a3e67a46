"""8-bit states in the Triton kernels: the reference's bits, through the interpreter or on a device."""

from __future__ import annotations

import math

import pytest

from epi_kernels.reference import codec
from python_tests import stage_checks as checks
from python_tests.harness import need_triton
from python_tests.stage_checks import INT8
from python_tests.triton_stages import DEVICE, backend

need_triton()

TAILS = (1, 63, 64, 65, 4099)


@pytest.fixture
def triton_backend():
    """The smallest chunks: 4099 elements are three of them."""
    return backend()


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtypes", checks.DTYPES_INT8, ids=checks.names)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_step_and_its_stats_in_every_dtype(dtypes, shift, stochastic, triton_backend):
    checks.check_step(triton_backend, DEVICE, dtypes, shift, stochastic)


def test_mixed_dtypes_and_tails_in_one_call(triton_backend):
    every = [*checks.DTYPES, *checks.DTYPES_INT8]
    expected = [t for i, dtypes in enumerate(every) for t in checks.params((TAILS[i % 5],), *dtypes)]
    ours = checks.copies(expected, DEVICE)
    for side, tensors in ((triton_backend, ours), (checks.REFERENCE, expected)):
        checks.run_step(side, tensors)
    checks.assert_same(ours, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", TAILS)
def test_a_gradient_that_is_not_finite_poisons_its_block_alone(n, bad, triton_backend):
    expected = checks.params((n,), checks.BF16, INT8, INT8)
    assert expected[0].grad is not None
    expected[0].grad[n // 2] = bad
    ours = checks.copies(expected, DEVICE)
    for side, tensors in ((triton_backend, ours), (checks.REFERENCE, expected)):
        checks.run_step(side, tensors)
        checks.run_step(side, tensors)  # what was poisoned stays so
    checks.assert_same(ours, expected)
    for name in ("exp_avg_scale", "exp_avg_sq_scale", "importance_scale"):
        scales = getattr(ours[0], name)
        bad_blocks = (scales == codec.NONFINITE).nonzero().view(-1).tolist()
        assert bad_blocks == [n // 2 // codec.BLOCK], name


def test_magnitudes_from_subnormal_to_beyond_the_code(triton_backend):
    checks.check_magnitudes(triton_backend, DEVICE)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("normalization", "factor"), checks.NORMALIZATIONS)
@pytest.mark.parametrize("domains", [1, 3])
def test_refresh_stages(domains, factor, normalization, shift, triton_backend):
    checks.check_refresh(triton_backend, DEVICE, INT8, shift, normalization, factor, domains)


@pytest.mark.parametrize("stride", [1, 2, 3, 64])
@pytest.mark.parametrize("shift", [0, 1])
def test_sampled_counts(stride, shift, triton_backend):
    checks.check_sampled_counts(triton_backend, DEVICE, stride, shift, dtype=INT8)
