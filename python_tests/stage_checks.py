"""One stage of a backend beside the reference's on the CPU, bit for bit; on any device.

The tests of a backend call these with their own parametrization.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from epi_kernels.backends.batch import StepBatch
from epi_kernels.backends.protocol import Backend
from epi_kernels.backends.reference import ReferenceBackend
from epi_kernels.policies import selection
from epi_kernels.reference import codec
from epi_kernels.reference.stats import LayerStats, ScoreTerms, score_terms
from epi_kernels.reference.tensors import ParamTensors
from epi_kernels.reference.threshold import KthSearch, SearchProblem
from python_tests.harness import assert_same_bits, logical
from python_tests.stage_tensors import (  # noqa: F401  what the tests of a backend take from here
    BF16,
    CPU,
    DTYPES,
    DTYPES_CORRECTED,
    DTYPES_INT4,
    DTYPES_INT8,
    F32,
    INT4,
    INT8,
    SIZES,
    copies,
    names,
    nonempty,
    params,
    refresh_params,
    to,
)

REFERENCE = ReferenceBackend()
KEEP = selection.keep_factor(0.3)
NORMALIZATIONS = [  # hysteresis is refused with zscore
    ("minmax", 1.0),
    ("none", 1.0),
    ("zscore", 1.0),
    ("minmax", KEEP),
    ("none", KEEP),
]


# --- searches -----------------------------------------------------------------------------------------------


def search_problem(
    k: list[int],
    domain: list[int],
    *,
    floor: int,
    end: int,
    bin_bits: int,
    keep_factor: float,
    n_elements: list[int] | None = None,
    zeros: list[int] | None = None,
    device: torch.device = CPU,
) -> SearchProblem:
    """Sizes are only read where a sample is taken; without ``zeros`` every element has state."""

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return SearchProblem(
        k=ints(k),
        domain=ints(domain),
        n_elements=ints(n_elements or [0] * len(k)),
        zeros=ints(zeros or [0] * len(domain)),
        floor=floor,
        end=end,
        bin_bits=bin_bits,
        keep_factor=keep_factor,
    )


# --- comparisons --------------------------------------------------------------------------------------------


def assert_same(actual: list[ParamTensors], expected: list[ParamTensors]) -> None:
    for row, (a, b) in enumerate(zip(actual, expected, strict=True)):
        for field in dataclasses.fields(a):
            value = getattr(b, field.name)
            if isinstance(value, torch.Tensor):
                assert_same_bits(logical(getattr(a, field.name)), logical(value), f"row {row} {field.name}")


def assert_same_stats(actual: LayerStats, expected: LayerStats) -> None:
    """zscore's sums may differ in their last bits between backends."""
    for name in ("minimum", "maximum", "nonfinite"):
        assert torch.equal(getattr(actual, name).cpu(), getattr(expected, name)), name
    torch.testing.assert_close(actual.moments.cpu(), expected.moments, rtol=1e-12, atol=0)


def run_step(
    backend: Backend,
    tensors: list[ParamTensors],
    *,
    stochastic_rounding: bool = True,
    grad_scale: float | torch.Tensor | None = None,
    found_inf: float | torch.Tensor | None = None,
    stats: LayerStats | None = None,
) -> None:
    """One step of tensors that belong to no optimizer."""
    device = tensors[0].param.device if tensors else CPU

    def scalar(value):
        return torch.tensor([value], device=device) if isinstance(value, float) else value

    backend.step(
        StepBatch(tensors),
        seed=5,
        stochastic_rounding=stochastic_rounding,
        grad_scale=scalar(grad_scale),
        found_inf=scalar(found_inf),
        stats=stats,
    )


# --- stages -------------------------------------------------------------------------------------------------


def check_step(
    backend: Backend, device: torch.device, dtypes: tuple, shift: int, stochastic_rounding: bool
) -> None:
    """Three steps: with stats and moments, with an unscaled gradient, with stats alone."""
    expected = nonempty(params(SIZES, *dtypes, shift=shift))
    ours = copies(expected, device, shift)
    for scale, with_stats, moments in ((None, True, True), (3.0, False, False), (None, True, False)):
        stats = [LayerStats.empty(3, d, with_moments=moments) for d in (device, CPU)]
        for side, tensors, into in ((backend, ours, stats[0]), (REFERENCE, expected, stats[1])):
            run_step(
                side,
                tensors,
                stochastic_rounding=stochastic_rounding,
                grad_scale=scale,
                stats=into if with_stats else None,
            )
        assert_same(ours, expected)
        assert_same_stats(*stats)


def check_mixed_step(backend: Backend, device: torch.device) -> None:
    """Every combination of dtypes in one call."""
    expected = [t for dtypes in DTYPES for t in params((9, 4097), *dtypes)]
    ours = copies(expected, device)
    for side, tensors in ((backend, ours), (REFERENCE, expected)):
        run_step(side, tensors)
    assert_same(ours, expected)


def check_tails(backend: Backend, device: torch.device, sizes: tuple[int, ...]) -> None:
    """Every combination of dtypes, 8-bit ones among them, of these sizes in one call."""
    expected = [
        t
        for dtypes in (*DTYPES, *DTYPES_INT8, *DTYPES_INT4, *DTYPES_CORRECTED)
        for t in params(sizes, *dtypes)
    ]
    ours = copies(expected, device)
    for _ in range(2):
        run_step(backend, ours)
        run_step(REFERENCE, expected)
    assert_same(ours, expected)


def check_spoiled_block(backend: Backend, device: torch.device, dtype: torch.dtype, bad: float) -> None:
    """A gradient that is not finite, or too large for its square, spoils its block of 64 alone, and for good."""
    expected = params((300,), dtype, INT8, INT8) + params((300,), dtype, INT4, None)
    for item in expected:
        item.grad[70] = bad
    ours = copies(expected, device)
    for _ in range(2):
        run_step(backend, ours)
        run_step(REFERENCE, expected)
        assert_same(ours, expected)
    for name in ("exp_avg_sq_scale", "importance_scale"):
        scales = getattr(ours[0], name).tolist()
        assert [block for block, scale in enumerate(scales) if scale == codec.NONFINITE] == [1], name
    assert (~torch.isfinite(ours[1].exp_avg_sq_scale.cpu())).tolist() == [False, True, False, False, False]


def check_magnitudes(backend: Backend, device: torch.device) -> None:
    """Codes of gradients over all exponents, and far apart in a block: tiny blocks, blocks at the code's end, zeros."""
    exponents = torch.arange(-150, 129, dtype=torch.float64).repeat_interleave(codec.BLOCK)
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(len(exponents), generator=generator, dtype=torch.float64) * 2 - 1
    values *= 2.0 ** (-16 * torch.rand(len(exponents), generator=generator, dtype=torch.float64))
    expected = []
    for dtypes in ((INT8, INT8), (INT4, None)):
        (item,) = params((len(exponents),), F32, *dtypes)
        states = ("exp_avg", "exp_avg_sq", "importance")
        held = [name for s in states for name in (s, f"{s}_scale") if getattr(item, name) is not None]
        fresh = {name: torch.zeros_like(getattr(item, name)) for name in held}
        expected.append(dataclasses.replace(item, grad=(values * 2.0**exponents).float(), **fresh))
    ours = copies(expected, device)
    for _ in range(3):
        run_step(backend, ours)
        run_step(REFERENCE, expected)
        assert_same(ours, expected)


def check_refresh(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    shift: int,
    normalization: str,
    factor: float,
    domains: int,
) -> None:
    """Stand-alone stats, the k-th score, and masks at it, at no threshold and at zero."""
    expected = refresh_params(dtype, shift)
    ours = copies(expected, device, shift)
    stats = [LayerStats.empty(3, d, with_moments=normalization == "zscore") for d in (device, CPU)]
    backend.accumulate(ours, stats[0])
    REFERENCE.accumulate(expected, stats[1])
    assert_same_stats(*stats)

    n = torch.tensor([sum(t.param.numel() for t in expected if t.layer == layer) for layer in range(3)])
    terms = score_terms(stats[1], n, normalization)
    thresholds = [
        _kth_score(side, d, tensors, to(terms, d), n, normalization, factor, domains)
        for side, d, tensors in ((backend, device, ours), (REFERENCE, CPU, expected))
    ]
    assert torch.equal(*thresholds)
    layer_thresholds = thresholds[1].expand(3).clone() if domains == 1 else thresholds[1]
    for bound in (layer_thresholds, torch.full((3,), math.inf), torch.zeros(3)):
        drift = [torch.ones(3, 3, dtype=torch.int64, device=d) for d in (device, CPU)]
        backend.select(ours, to(terms, device), bound.to(device), factor, drift[0])
        REFERENCE.select(expected, terms, bound, factor, drift[1])
        assert torch.equal(drift[0].cpu(), drift[1])
        assert_same(ours, expected)


def _kth_score(
    backend: Backend,
    device: torch.device,
    tensors: list[ParamTensors],
    terms: ScoreTerms,
    n: torch.Tensor,
    normalization: str,
    factor: float,
    domains: int,
) -> torch.Tensor:
    floor, end = selection.key_range(normalization, factor)
    k = [int(n.sum()) // 10] if domains == 1 else [int(n[0]) // 10, 0, 3]
    domain = [0, 0, 0] if domains == 1 else [0, 1, 2]
    bits = selection.bin_bits(domains)
    search = KthSearch.start(
        search_problem(k, domain, floor=floor, end=end, bin_bits=bits, keep_factor=factor, device=device)
    )
    for _ in range(6):
        search.histogram.zero_()
        backend.count(tensors, terms, search)
        search.select()
    assert bool(search.done.all())
    return search.threshold.cpu()


def check_sampled_counts(
    backend: Backend, device: torch.device, stride: int, shift: int, dtype: torch.dtype = F32
) -> None:
    """Every ``stride``-th block, one domain done, one layer without spread."""
    expected = refresh_params(dtype, shift)
    terms = ScoreTerms(torch.tensor([0.0, 0.1, 0.0]), torch.tensor([1.0, 2.0, 0.0]), positive_only=True)
    search = KthSearch.start(
        search_problem([50, 0], [0, 1, 0], floor=2**31, end=2**32, bin_bits=8, keep_factor=0.5)
    )
    on_device = to(search, device)
    backend.count(copies(expected, device, shift), to(terms, device), on_device, stride)
    REFERENCE.count(expected, terms, search, stride)
    assert int(search.histogram.sum()) > 0
    assert torch.equal(on_device.histogram.cpu(), search.histogram)
