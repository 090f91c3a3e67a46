"""States of 8 and of 4 bits in the CUDA kernels' bodies, played by the CPU: the reference's bits, no GPU needed."""

from __future__ import annotations

import math

import pytest

from epi_kernels.backends import cuda
from python_tests import cuda_emulation
from python_tests import stage_checks as checks
from python_tests.stage_checks import CPU, INT4, INT8, KEEP

pytestmark = pytest.mark.skipif(
    cuda_emulation.missing() is not None, reason=f"emulation: {cuda_emulation.missing()}"
)
TAILS = (1, 15, 16, 17, 63, 64, 65, 511, 513, 4099)


@pytest.fixture(params=[cuda.MAX_PROGRAMS, 2], ids=["a-chunk-a-program", "two-programs"])
def emulated(request, monkeypatch) -> cuda_emulation.EmulatedCudaBackend:
    """The backend; with two programs, each walks over many tensors and layers."""
    monkeypatch.setattr(cuda, "MAX_PROGRAMS", request.param)
    return cuda_emulation.EmulatedCudaBackend(threads=8 if request.param == 2 else 4)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    "dtypes", checks.DTYPES_INT8 + checks.DTYPES_INT4 + checks.DTYPES_CORRECTED, ids=checks.names
)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_step_and_its_stats_in_every_dtype(dtypes, shift, stochastic, emulated):
    checks.check_step(emulated, CPU, dtypes, shift, stochastic)


def test_every_dtype_and_tail_in_one_call(emulated):
    checks.check_tails(emulated, CPU, TAILS)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, 1e20])
@pytest.mark.parametrize("dtype", [checks.F32, checks.BF16], ids=["f32", "bf16"])
def test_a_gradient_that_is_not_finite_spoils_its_block_alone(emulated, dtype, bad):
    checks.check_spoiled_block(emulated, CPU, dtype, bad)


def test_magnitudes_from_subnormal_to_beyond_the_code(emulated):
    checks.check_magnitudes(emulated, CPU)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("normalization", "factor"), checks.NORMALIZATIONS)
@pytest.mark.parametrize("domains", [1, 3])
def test_refresh_stages(domains, factor, normalization, shift, emulated):
    checks.check_refresh(emulated, CPU, INT8, shift, normalization, factor, domains)


@pytest.mark.parametrize("stride", [1, 2, 3, 64])
@pytest.mark.parametrize("shift", [0, 1])
def test_sampled_counts(stride, shift, emulated):
    checks.check_sampled_counts(emulated, CPU, stride, shift, dtype=INT8)


@pytest.mark.parametrize(
    ("normalization", "factor", "domains", "shift"), [("zscore", 1.0, 1, 0), ("none", KEEP, 3, 1)]
)
def test_refresh_stages_of_4_bit_states(normalization, factor, domains, shift, emulated):
    checks.check_refresh(emulated, CPU, INT4, shift, normalization, factor, domains)


def test_sampled_counts_of_4_bit_states(emulated):
    checks.check_sampled_counts(emulated, CPU, 3, 1, dtype=INT4)
