"""More than 2^31 elements in one tensor: bfloat16 weights and states, looked at through windows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from epi_kernels.reference.scalars import HyperParameters
from epi_kernels.reference.stats import LayerStats, ScoreTerms
from epi_kernels.reference.tensors import ParamTensors
from epi_kernels.reference.threshold import KthSearch
from python_tests import stage_checks as checks

pytestmark = pytest.mark.gpu

WINDOW = 4096
BYTES_PER_ELEMENT = 8.2  # weight, gradient, two states in bfloat16, the mask; filled in place


def large_tensors(n: int, device: torch.device) -> ParamTensors:
    generator = torch.Generator(device).manual_seed(5)

    def make(positive: bool = False) -> torch.Tensor:
        tensor = torch.empty(n, dtype=torch.bfloat16, device=device)
        for piece in tensor.split(1 << 28):
            piece.normal_(generator=generator)
            if positive:
                piece.abs_()
        return tensor

    mask = torch.empty((n + 7) // 8, dtype=torch.uint8, device=device).random_(0, 256, generator=generator)
    if n % 8:
        mask[-1] &= (1 << n % 8) - 1
    return ParamTensors(
        make(),
        make(),
        make(),
        make(True),
        None,
        mask,
        None,
        step=torch.tensor(1.0, device=device),
        hyper=HyperParameters(lr=1e-2, beta1=0.9, beta2=0.99, beta_u=0.99, eps=1e-8, weight_decay=0.1),
        rng_id=77,
    )


def window(whole: ParamTensors, start: int, stop: int) -> ParamTensors:
    """Elements start .. stop - 1 on the CPU, where they know their place; start is a multiple of 8."""
    cut = {
        name: getattr(whole, name)[start:stop].to("cpu", copy=True)
        for name in ("param", "grad", "exp_avg", "exp_avg_sq")
    }
    cut["step"] = torch.tensor(1.0)  # before the step; the large one's may have gone on
    mask = whole.isolation_mask[start // 8 : (stop + 7) // 8].to("cpu", copy=True)
    return dataclasses.replace(whole, **cut, isolation_mask=mask, index_offset=start)


def test_more_than_two_to_the_31(backend, device):
    on_gpu = device.type == "cuda"
    n = 2**31 + 2**16 + 5 if on_gpu else 2**16 + 5
    if backend.name == "reference" and on_gpu:
        pytest.skip("the reference's step needs float32 temporaries of the whole tensor")
    if on_gpu:
        free = torch.cuda.mem_get_info(device)[0]
        if free < BYTES_PER_ELEMENT * n + 2**30:
            pytest.skip(f"needs {BYTES_PER_ELEMENT * n / 2**30:.0f} GiB of free device memory")
    whole = large_tensors(n, device)
    starts = [0, n // 3 // 8 * 8, (n - WINDOW - 5) // 8 * 8] + ([2**31 - WINDOW // 2] if on_gpu else [])
    bounds = [(start, min(start + WINDOW + 5, n)) for start in starts]
    expected = [window(whole, *b) for b in bounds]

    stats = LayerStats.empty(1, device, with_moments=False)
    checks.run_step(backend, [whole], stats=stats)
    checks.run_step(checks.REFERENCE, expected)
    checks.assert_same([window(whole, *b) for b in bounds], expected)
    low, high = whole.exp_avg_sq.aminmax()
    assert float(stats.minimum) == float(low) and float(stats.maximum) == float(high)

    terms = ScoreTerms(stats.minimum, stats.maximum - stats.minimum, positive_only=True)
    floor, end = checks.selection.key_range("minmax", 1.0)
    problem = checks.search_problem(
        [n // 100], [0], floor=floor, end=end, bin_bits=11, keep_factor=1.0, device=device
    )
    search = KthSearch.start(problem)
    for number in range(4):
        search.histogram.zero_()
        backend.count([whole], terms, search)
        if number == 0:
            assert int(search.histogram.sum()) == n
        search.select()
    assert bool(search.done.all()) and int(search.count_ge) >= n // 100

    drift = torch.zeros(1, 3, dtype=torch.int64, device=device)
    backend.select([whole], terms, search.threshold, 1.0, drift)
    checks.REFERENCE.select(
        expected,
        checks.to(terms, checks.CPU),
        search.threshold.cpu(),
        1.0,
        torch.zeros(1, 3, dtype=torch.int64),
    )
    checks.assert_same([window(whole, *b) for b in bounds], expected)
    assert int(drift[0, 0]) == int(search.count_ge)
