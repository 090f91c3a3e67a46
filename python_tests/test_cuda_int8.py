"""8-bit states in the CUDA kernels' bodies, played by the CPU: the reference's bits, no GPU needed."""

from __future__ import annotations

import math

import pytest

from epi_kernels.backends import cuda
from epi_kernels.reference import codec
from python_tests import cuda_emulation
from python_tests import stage_checks as checks
from python_tests.stage_checks import BF16, CPU, F32, INT8

pytestmark = pytest.mark.skipif(
    cuda_emulation.missing() is not None, reason=f"emulation: {cuda_emulation.missing()}"
)
TAILS = (1, 63, 64, 65, 4099)


@pytest.fixture(params=[cuda.MAX_PROGRAMS, 2], ids=["a-chunk-a-program", "two-programs"])
def emulated(request, monkeypatch) -> cuda_emulation.EmulatedCudaBackend:
    """The backend; with two programs, each walks over many tensors and layers."""
    monkeypatch.setattr(cuda, "MAX_PROGRAMS", request.param)
    return cuda_emulation.EmulatedCudaBackend(threads=8 if request.param == 2 else 4)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtypes", checks.DTYPES_INT8, ids=checks.names)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_step_and_its_stats_in_every_dtype(dtypes, shift, stochastic, emulated):
    checks.check_step(emulated, CPU, dtypes, shift, stochastic)
