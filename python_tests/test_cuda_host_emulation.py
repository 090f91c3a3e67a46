"""The CUDA kernels' bodies, bindings and dispatcher on the CPU, bit for bit: no GPU is needed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from epi_kernels.backends import cuda, dispatch
from epi_kernels.backends.reference import ReferenceBackend
from epi_kernels.policies import selection
from epi_kernels.reference.scalars import step_scalars
from epi_kernels.reference.stats import LayerStats, ScoreTerms, score_terms
from epi_kernels.reference.tensors import ParamTensors
from epi_kernels.reference.threshold import KthSearch
from python_tests import cuda_emulation
from python_tests.cases import CASES, Spec, case
from python_tests.harness import Pair, Target, assert_same_bits, logical
from python_tests.oracle import Hyper

pytestmark = pytest.mark.skipif(
    cuda_emulation.missing() is not None, reason=f"emulation: {cuda_emulation.missing()}"
)

REFERENCE = ReferenceBackend()


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


def test_sampled_bracket_of_a_million_elements(as_cuda):
    n = selection.SAMPLE_FROM_ELEMENTS
    pair = Pair(
        case(Spec((n // 2 + 9,)), Spec((n // 2,)), mask_interval=1, hyper=Hyper(betas=(0.9, 0.5))), as_cuda
    )
    for kind in ("spread", "normal"):
        pair.step(pair.gradients([kind] * 2))
        pair.check()


# --- stages one by one, against the reference -----------------------------------------------------------------


def params(
    sizes: list[int], param: torch.dtype, state: torch.dtype, importance: torch.dtype | None, shift: int = 0
) -> list[ParamTensors]:
    """``shift``: elements every tensor is off its allocation's start."""
    generator = torch.Generator().manual_seed(len(sizes) + shift)

    def make(n: int, dtype: torch.dtype, positive: bool = False) -> torch.Tensor:
        values = torch.randn(n + shift, generator=generator).to(dtype)[shift:]
        return values.square() if positive and not shift else values.abs_() if positive else values

    scalars = step_scalars(
        3, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, importance_beta=0.5 if importance else None
    )
    result = []
    for row, n in enumerate(sizes):
        mask = torch.randint(0, 256, ((n + 7) // 8,), dtype=torch.uint8, generator=generator)
        if n % 8:
            mask[-1] &= (1 << n % 8) - 1
        persistent = None if row % 2 else (mask >> 1).clone()
        result.append(
            ParamTensors(
                param=make(n, param),
                grad=make(n, param),
                exp_avg=make(n, state),
                exp_avg_sq=make(n, state, positive=True),
                importance=None if importance is None else make(n, importance, positive=True),
                isolation_mask=mask if row % 3 else None,
                persistent_mask=persistent,
                layer=row % 3 - 1 if row else 0,
                scalars=scalars,
                maximize=row % 2 == 1,
                rng_key=12345 + row,
                index_offset=[0, 2**32 - 3000, 2**33 + 5][row % 3],
            )
        )
    return result


def clones(tensors: list[ParamTensors], shift: int) -> list[ParamTensors]:
    """Deep copies that keep every tensor's distance to a 16-byte boundary."""

    def clone(value):
        if not isinstance(value, torch.Tensor):
            return value
        buffer = torch.empty(value.numel() + shift, dtype=value.dtype)
        return buffer[shift:].copy_(value)

    return [
        dataclasses.replace(t, **{f.name: clone(getattr(t, f.name)) for f in dataclasses.fields(t)})
        for t in tensors
    ]


def assert_same(actual: list[ParamTensors], expected: list[ParamTensors]) -> None:
    for row, (a, b) in enumerate(zip(actual, expected, strict=True)):
        for field in dataclasses.fields(a):
            value = getattr(b, field.name)
            if isinstance(value, torch.Tensor):
                assert_same_bits(logical(getattr(a, field.name)), logical(value), f"row {row} {field.name}")


def assert_same_stats(actual: LayerStats, expected: LayerStats) -> None:
    for name in ("minimum", "maximum", "nonfinite"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    torch.testing.assert_close(actual.moments, expected.moments, rtol=1e-12, atol=0)


C = cuda.CHUNK
SIZES = [5, C + 3, 0, 2 * C, 1, 77, 300]
F32, BF16 = torch.float32, torch.bfloat16
DTYPES = [(p, s, u) for p in (F32, BF16) for s in (F32, BF16) for u in (None, F32, BF16)]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(x).replace("torch.", "") for x in d))
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_step_and_its_stats_in_every_dtype(dtypes, shift, stochastic, emulated):
    ours = params(SIZES, *dtypes, shift=shift)
    expected = clones(ours, shift)
    for multiplier, wants_stats, moments in ((None, True, True), (0.25, False, False), (None, True, False)):
        stats = [LayerStats.empty(3, torch.device("cpu"), with_moments=moments) for _ in range(2)]
        for backend, tensors, into in ((emulated, ours, stats[0]), (REFERENCE, expected, stats[1])):
            tensors = [t for t in tensors if t.param.numel()]  # the reference's min() wants an element
            backend.step(
                tensors,
                stochastic_rounding=stochastic,
                grad_multiplier=multiplier,
                stats=into if wants_stats else None,
            )
        assert_same(ours, expected)
        assert_same_stats(*stats)


def test_step_of_mixed_dtypes_in_one_call(emulated):
    ours = [t for d in DTYPES for t in params([9, C + 1], *d)]
    expected = clones(ours, 0)
    for backend, tensors in ((emulated, ours), (REFERENCE, expected)):
        backend.step(tensors, stochastic_rounding=True, grad_multiplier=None, stats=None)
    assert_same(ours, expected)


KEEP = selection.keep_factor(0.3)


def refresh_tensors(dtype: torch.dtype, shift: int) -> list[ParamTensors]:
    tensors = params(SIZES, dtype, dtype, None, shift)
    for row, t in enumerate(tensors):
        t.layer = row % 3
        if t.isolation_mask is None:
            t.isolation_mask = torch.zeros((t.param.numel() + 7) // 8, dtype=torch.uint8)
        if t.exp_avg_sq.numel() > 4:
            t.exp_avg_sq[:4] = torch.tensor([torch.inf, torch.nan, 0.0, -torch.inf], dtype=dtype)
    return [t for t in tensors if t.param.numel()]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("normalization", "factor"),  # hysteresis is refused with zscore
    [("minmax", 1.0), ("none", 1.0), ("zscore", 1.0), ("minmax", KEEP), ("none", KEEP)],
)
@pytest.mark.parametrize("domains", [1, 3])
def test_refresh_stages(domains, factor, normalization, dtype, shift, emulated):
    ours = refresh_tensors(dtype, shift)
    expected = clones(ours, shift)
    stats = [
        LayerStats.empty(3, torch.device("cpu"), with_moments=normalization == "zscore") for _ in range(2)
    ]
    emulated.accumulate(ours, stats[0])
    REFERENCE.accumulate(expected, stats[1])
    assert_same_stats(*stats)

    n = torch.tensor([sum(t.param.numel() for t in ours if t.layer == layer) for layer in range(3)])
    terms = score_terms(stats[1], n, normalization)
    thresholds = []
    for backend, tensors in ((emulated, ours), (REFERENCE, expected)):
        thresholds.append(_search(backend, tensors, terms, n, normalization, factor, domains))
    assert torch.equal(*thresholds)
    layer_thresholds = thresholds[1].expand(3).clone() if domains == 1 else thresholds[1].clone()
    for bound in (layer_thresholds, torch.full((3,), torch.inf), torch.zeros(3)):
        drift = [torch.ones(3, 3, dtype=torch.int64) for _ in range(2)]
        emulated.select(ours, terms, bound, factor, drift[0])
        REFERENCE.select(expected, terms, bound, factor, drift[1])
        assert torch.equal(*drift)
        assert_same(ours, expected)


def _search(
    backend,
    tensors: list[ParamTensors],
    terms: ScoreTerms,
    n: torch.Tensor,
    normalization: str,
    factor: float,
    domains: int,
) -> torch.Tensor:
    floor, end = selection.key_range(normalization, factor)
    k = [int(n.sum()) // 10] if domains == 1 else [int(n[0]) // 10, 0, 3]
    search = KthSearch.start(
        torch.tensor(k),
        torch.zeros(3, dtype=torch.int64) if domains == 1 else torch.arange(3),
        floor=floor,
        end=end,
        bin_bits=selection.bin_bits(domains),
        keep_factor=factor,
    )
    for _ in range(6):
        search.histogram.zero_()
        backend.count(tensors, terms, search)
        search.select()
    assert bool(search.done.all())
    return search.threshold


@pytest.mark.parametrize("stride", [1, 2, 3, 64])
@pytest.mark.parametrize("shift", [0, 1])
def test_sampled_counts(stride, shift, emulated):
    tensors = refresh_tensors(F32, shift)
    terms = ScoreTerms(torch.tensor([0.0, 0.1, 0.0]), torch.tensor([1.0, 2.0, 0.0]), positive_only=True)
    searches = [
        KthSearch.start(
            torch.tensor([50, 0]),
            torch.tensor([0, 1, 0]),
            floor=2**31,
            end=2**32,
            bin_bits=8,
            keep_factor=0.5,
        )
        for _ in range(2)
    ]
    emulated.count(tensors, terms, searches[0], stride)
    REFERENCE.count(tensors, terms, searches[1], stride)
    assert int(searches[1].histogram.sum()) > 0
    assert torch.equal(searches[0].histogram, searches[1].histogram)


def test_two_runs_give_the_same_moments(emulated):
    tensors = refresh_tensors(F32, 0)
    runs = []
    for _ in range(2):
        stats = LayerStats.empty(3, torch.device("cpu"), with_moments=True)
        emulated.accumulate(tensors, stats)
        runs.append(stats.moments)
    assert torch.equal(*runs)


def test_empty_lists_and_lists_of_empties(emulated):
    stats = LayerStats.empty(1, torch.device("cpu"), with_moments=False)
    for tensors in ([], params([0], F32, F32, None)):
        emulated.step(tensors, stochastic_rounding=True, grad_multiplier=None, stats=stats)
        emulated.accumulate(tensors, stats)
    assert float(stats.minimum) == np.inf


def test_bindings_refuse_wrong_tensors(emulated):
    ops = emulated._ops
    rows, programs = torch.zeros(1, 12, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)
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
    scalars = torch.zeros(9)
    with pytest.raises(RuntimeError, match="kind"):
        ops.cuda_step(rows, programs, runs, scalars, 12, False, False, 1.0, partials[:0], False)
    with pytest.raises(RuntimeError, match="scalars"):
        ops.cuda_step(rows, programs, runs, scalars[:8], 0, False, False, 1.0, partials[:0], False)
