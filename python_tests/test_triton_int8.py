"""States of 8 and of 4 bits in the Triton kernels: the reference's bits, through the interpreter or on a device."""

from __future__ import annotations

import math

import pytest

from python_tests import stage_checks as checks
from python_tests.harness import need_triton
from python_tests.stage_checks import INT4, INT8, KEEP
from python_tests.triton_stages import DEVICE, backend

need_triton()

TAILS = (1, 63, 64, 65, 4099)


@pytest.fixture
def triton_backend():
    """The smallest chunks: 4099 elements are three of them."""
    return backend()


# the other two pairs are among the named cases of test_equality.py; in the interpreter each costs a minute
@pytest.mark.parametrize(
    ("shift", "stochastic"), [(0, True), (1, False)], ids=["aligned-stochastic", "shifted-nearest"]
)
@pytest.mark.parametrize(
    "dtypes", checks.DTYPES_INT8 + checks.DTYPES_INT4 + checks.DTYPES_CORRECTED, ids=checks.names
)
def test_step_and_its_stats_in_every_dtype(dtypes, shift, stochastic, triton_backend):
    checks.check_step(triton_backend, DEVICE, dtypes, shift, stochastic)


def test_every_dtype_and_tail_in_one_call(triton_backend):
    checks.check_tails(triton_backend, DEVICE, TAILS)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, 1e20])
@pytest.mark.parametrize("dtype", [checks.F32, checks.BF16], ids=["f32", "bf16"])
def test_a_gradient_that_is_not_finite_spoils_its_block_alone(triton_backend, dtype, bad):
    checks.check_spoiled_block(triton_backend, DEVICE, dtype, bad)


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


@pytest.mark.parametrize(
    ("normalization", "factor", "domains", "shift"), [("zscore", 1.0, 1, 0), ("none", KEEP, 3, 1)]
)
def test_refresh_stages_of_4_bit_states(normalization, factor, domains, shift, triton_backend):
    checks.check_refresh(triton_backend, DEVICE, INT4, shift, normalization, factor, domains)


def test_sampled_counts_of_4_bit_states(triton_backend):
    checks.check_sampled_counts(triton_backend, DEVICE, 3, 1, dtype=INT4)
