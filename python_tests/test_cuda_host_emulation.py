"""The CUDA kernels' bodies, bindings and dispatcher on the CPU, bit for bit: no GPU is needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from epi_kernels.backends import cuda, dispatch, table
from epi_kernels.policies import selection
from epi_kernels.reference.stats import LayerStats
from python_tests import cuda_emulation
from python_tests import stage_checks as checks
from python_tests.cases import CASES, Spec, case
from python_tests.harness import Pair, Target
from python_tests.oracle import Hyper
from python_tests.row_runs import ROUNDS, row_pair

pytestmark = pytest.mark.skipif(
    cuda_emulation.missing() is not None, reason=f"emulation: {cuda_emulation.missing()}"
)


@pytest.fixture(params=[cuda.MAX_PROGRAMS, 2], ids=["a-chunk-a-program", "two-programs"])
def emulated(request, monkeypatch) -> cuda_emulation.EmulatedCudaBackend:
    """The backend; with two programs, each walks over many tensors and layers."""
    monkeypatch.setattr(cuda, "MAX_PROGRAMS", request.param)
    return cuda_emulation.EmulatedCudaBackend(threads=8 if request.param == 2 else 4)


@pytest.fixture
def as_cuda(emulated, monkeypatch) -> Target:
    """`backend="cuda"` means the emulation."""
    load = dispatch.load
    monkeypatch.setattr(dispatch, "load", lambda name: emulated if name == "cuda" else load(name))
    return Target("cuda")


@pytest.mark.parametrize("name", CASES)
def test_named_case_against_the_oracle(name, as_cuda):
    pair = Pair(CASES[name], as_cuda)
    specs = pair.case.specs
    for kinds in (["normal"] * len(specs), ["ties", "sparse"], ["nonfinite", None, "small"]):
        pair.step(pair.gradients([kinds[i % len(kinds)] for i in range(len(specs))]))
        pair.check()
    pair.refresh()
    pair.check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "unaligned"])
def test_chunks_and_tails_against_the_oracle(dtype, layout, as_cuda):
    c = cuda.CHUNK
    specs = [Spec((n,), dtype, layout, layout) for n in (c - 1, c, c + 1, 3 * c + 13, 5)]
    pair = Pair(
        case(*specs, isolation_ratio=0.05, mask_interval=2, hysteresis=0.2, state_dtype="bfloat16"), as_cuda
    )
    for kind in ("normal", "spread", "sparse"):
        pair.step(pair.gradients([kind] * len(specs)))
        pair.check()


@pytest.mark.parametrize("scale", [1024.0, 3.0])
def test_grad_scale_and_found_inf(scale, as_cuda):
    pair = Pair(case(Spec((33, 17)), Spec((7,), "bfloat16"), isolation_ratio=0.1, mask_interval=2), as_cuda)
    for found_inf in (False, True, False):
        pair.step(pair.gradients(["normal", "small"]), grad_scale=scale, found_inf=found_inf)
        pair.check()


@pytest.mark.parametrize("name", ROUNDS)
def test_runs_of_rows_that_have_state(name, as_cuda):
    """Every run is a row of the tables, and counts its steps apart: found_inf skips them all."""
    pair = row_pair(as_cuda, isolation_ratio=0.1, mask_interval=2, **ROUNDS[name])
    for kind, options in (("normal", {}), ("ties", {"found_inf": True}), ("small", {"found_inf": False})):
        pair.step(pair.gradients([kind] * len(pair.params)), **options)
        pair.check()


def test_sampled_bracket_of_a_million_elements(as_cuda):
    n = selection.SAMPLE_FROM_ELEMENTS
    pair = Pair(
        case(Spec((n // 2 + 9,)), Spec((n // 2,)), mask_interval=1, hyper=Hyper(betas=(0.9, 0.5))), as_cuda
    )
    for kind in ("spread", "normal"):
        pair.step(pair.gradients([kind] * 2))
        pair.check()


# --- stages one by one, against the reference -----------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtypes", checks.DTYPES, ids=checks.names)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_step_and_its_stats_in_every_dtype(dtypes, shift, stochastic, emulated):
    checks.check_step(emulated, checks.CPU, dtypes, shift, stochastic)


def test_step_of_mixed_dtypes_in_one_call(emulated):
    checks.check_mixed_step(emulated, checks.CPU)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [checks.F32, checks.BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("normalization", "factor"), checks.NORMALIZATIONS)
@pytest.mark.parametrize("domains", [1, 3])
def test_refresh_stages(domains, factor, normalization, dtype, shift, emulated):
    checks.check_refresh(emulated, checks.CPU, dtype, shift, normalization, factor, domains)


@pytest.mark.parametrize("stride", [1, 2, 3, 64])
@pytest.mark.parametrize("shift", [0, 1])
def test_sampled_counts(stride, shift, emulated):
    checks.check_sampled_counts(emulated, checks.CPU, stride, shift)


def test_two_runs_give_the_same_moments(emulated):
    tensors = checks.refresh_params(checks.F32, 0)
    runs = []
    for _ in range(2):
        stats = LayerStats.empty(3, torch.device("cpu"), with_moments=True)
        emulated.accumulate(tensors, stats)
        runs.append(stats.moments)
    assert torch.equal(*runs)


def test_empty_lists_and_lists_of_empties(emulated):
    stats = LayerStats.empty(1, torch.device("cpu"), with_moments=False)
    for tensors in ([], checks.params((0,), checks.F32, checks.F32, None)):
        checks.run_step(emulated, tensors, stats=stats)
        emulated.accumulate(tensors, stats)
    assert float(stats.minimum) == np.inf


def test_bindings_refuse_wrong_tensors(emulated):
    ops = emulated._ops
    rows, programs = torch.zeros(1, table.COLUMNS, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)
    runs, partials = torch.zeros(1, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.float64)
    ops.cuda_stats(rows, programs, runs, partials, False)
    for bad in (
        (rows.float(), programs, runs, partials),
        (rows[:, :11].contiguous(), programs, runs, partials),
        (rows, programs[:1], runs, partials),
        (rows, programs, torch.zeros(2, dtype=torch.int64), partials),
        (rows, programs, runs, partials.float()),
    ):
        with pytest.raises(RuntimeError, match="epi_kernels"):
            ops.cuda_stats(*bad, False)
    scalars, none = torch.zeros(9), torch.zeros(0)
    for kind in (-1, 21, 48):  # 21: 4-bit states with an importance of its own
        with pytest.raises(RuntimeError, match="kind"):
            ops.cuda_step(rows, programs, runs, scalars, kind, False, none, partials[:0], False)
    with pytest.raises(RuntimeError, match="scalars"):
        ops.cuda_step(rows, programs, runs, scalars[:8], 0, False, none, partials[:0], False)
    hyper = torch.zeros(1, 4, dtype=torch.float64)
    for bad in ((hyper.float(), none), (hyper, torch.ones(1))):
        with pytest.raises(RuntimeError, match="hyper|grad_multiplier"):
            ops.cuda_prepare(rows, scalars, bad[0], 0, none, bad[1], none)
