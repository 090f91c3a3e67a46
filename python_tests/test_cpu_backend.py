"""The cpu backend's step against the reference, bit for bit, with every instruction set this processor has."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch

from epi_kernels.backends.cpu import ISA_VARIABLE, CpuBackend
from epi_kernels.reference.stats import LayerStats, score_terms
from python_tests import cpu_items
from python_tests.cpu_items import (
    BF16,
    CHUNK,
    DTYPES,
    FP32,
    LARGE,
    SMALL,
    assert_same,
    make_param,
    new_search,
    step_both,
)
from python_tests.stage_checks import run_step

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(params=cpu_items.isas())
def backend(request) -> CpuBackend:
    return CpuBackend(request.param)


# --- step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stochastic_rounding", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_step_gives_the_reference_bits_at_every_size(backend, dtypes, stochastic_rounding):
    items = [
        make_param(n, *dtypes, layer=i % 3 - 1, unaligned=unaligned)
        for unaligned in (False, True)
        for i, n in enumerate(SMALL)
    ]
    step_both(backend, items, layers=2, with_moments=True, stochastic_rounding=stochastic_rounding)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("unaligned", [False, True])
def test_step_across_chunks(backend, dtype, unaligned):
    """Where a tensor is cut into tasks."""
    items = [make_param(n, dtype, dtype, layer=i % 3 - 1, unaligned=unaligned) for i, n in enumerate(LARGE)]
    step_both(backend, items, layers=2, with_moments=True)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_step_with_special_values(backend, dtypes):
    items = [make_param(n, *dtypes, specials=True, layer=0) for n in (1, 16, 17, 600, 5000)]
    step_both(backend, items, layers=1, with_moments=False)
    step_both(backend, items, stochastic_rounding=False, grad_scale=3.0)


@pytest.mark.parametrize("mask", ["none", "empty", "random", "full"])
@pytest.mark.parametrize("param", [FP32, BF16])
def test_step_keeps_isolated_bits(backend, param, mask):
    step_both(backend, [make_param(n, param, specials=True, mask=mask) for n in (1, 15, 16, 700)])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("scale", [None, 1.0, 1024.0, 3.0])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "transposed"])
def test_step_options_and_layouts(backend, layout, scale, maximize):
    items = [
        make_param(n, param, state, layout=layout, maximize=maximize)
        for n in (0, 5, 35, 515)
        for param, state in ((FP32, FP32), (BF16, FP32), (BF16, BF16))
    ]
    step_both(backend, items, grad_scale=scale)


@pytest.mark.parametrize(
    "offset", [1, 13, (1 << 32) - 700, (1 << 32) - 16, (1 << 32) - 5, 1 << 32, (5 << 32) + 3]
)
def test_random_bits_follow_the_logical_index(backend, offset):
    items = [make_param(n, BF16, BF16, BF16, index_offset=offset) for n in (3, 16, 1500)]
    step_both(backend, items)


def test_a_shard_draws_what_the_whole_draws(backend):
    whole = make_param(4096, BF16, BF16, mask="none")
    start = 1032
    shard = copy.deepcopy(whole)
    for name in ("param", "grad", "exp_avg", "exp_avg_sq"):
        setattr(shard, name, getattr(shard, name)[start:])
    shard.index_offset = start
    for item in (whole, shard):
        run_step(backend, [item])
    assert_same(whole.param[start:], shard.param)
    assert_same(whole.exp_avg_sq[start:], shard.exp_avg_sq)


def test_zero_dim_and_many_tensors(backend):
    scalar = make_param(1, layer=0)
    scalar.param, scalar.grad = scalar.param.view(()), scalar.grad.view(())
    many = [make_param(n % 37, BF16 if n % 3 else FP32, seed=n, layer=n % 5) for n in range(200)]
    step_both(backend, [scalar, *many], layers=5, with_moments=True)
    step_both(backend, [])


def test_refused_dtype_names_it(backend):
    item = make_param(3)
    item.exp_avg_sq = item.exp_avg_sq.double()
    with pytest.raises(TypeError, match="exp_avg_sq.*float64"):
        run_step(backend, [item], stochastic_rounding=False)


def test_a_layer_out_of_range_is_refused(backend):
    item = make_param(3, layer=2)
    before = copy.deepcopy(item)
    stats = LayerStats.empty(2, torch.device("cpu"), with_moments=False)
    with pytest.raises(RuntimeError, match="layer 2 of 2"):
        run_step(backend, [item], stochastic_rounding=False, stats=stats)
    assert_same(before, item)


# --- threads, instruction sets ------------------------------------------------------------------


def run_all(backend: CpuBackend, threads: int):
    torch.set_num_threads(threads)
    items = [make_param(n, BF16, BF16, seed=n, layer=n % 2) for n in (5 * CHUNK + 3, 100, 3 * CHUNK, 9)]
    stats = LayerStats.empty(2, torch.device("cpu"), with_moments=True)
    run_step(backend, items, stats=stats)
    alone = LayerStats.empty(2, torch.device("cpu"), with_moments=True)
    backend.accumulate(items, alone)
    terms = score_terms(stats, torch.tensor([8 * CHUNK, 8 * CHUNK]), "zscore")
    search = new_search([50, 60], [0, 1], terms, 1.0)
    backend.count(items, terms, search)
    drift = torch.zeros(2, 3, dtype=torch.int64)
    backend.select(items, terms, torch.tensor([1.0, 2.0]), 1.0, drift)
    return items, stats, alone, search, drift


def test_any_number_of_threads_gives_the_same_bits(backend):
    one = run_all(backend, 1)
    assert_same(one, run_all(backend, 2))
    assert_same(one, run_all(backend, 3))
    assert_same(one[1], one[2])  # in the step or alone: the moments too


def test_instruction_sets_agree_to_the_bit():
    """The moments too: the lanes they are summed in are the same everywhere."""
    results = [run_all(CpuBackend(isa), 2) for isa in cpu_items.isas()]
    for other in results[1:]:
        assert_same(results[0], other)


def test_the_variable_chooses_and_refuses():
    code = "from epi_kernels.backends.cpu import CpuBackend; print(CpuBackend().description)"
    for isa, expected in (("plain", "C++, plain"), ("sse9", "instruction set 'sse9'")):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, ISA_VARIABLE: isa},
            capture_output=True,
            text=True,
            check=False,
        )
        assert expected in result.stdout + result.stderr


def test_refuses_what_it_cannot_take(backend):
    assert backend.refuses(torch.device("cpu"), FP32) is None
    assert backend.refuses(torch.device("cpu"), BF16) is None
    assert "cuda" in backend.refuses(torch.device("cuda"), FP32)
    assert "float64" in backend.refuses(torch.device("cpu"), torch.float64)
