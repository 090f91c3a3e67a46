"""The cpu backend against the reference, bit for bit, with every instruction set this processor has."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import subprocess
import sys

import pytest
import torch

from epi_kernels.backends.cpu import ISA_VARIABLE, CpuBackend
from epi_kernels.backends.reference import ReferenceBackend
from epi_kernels.reference import bits
from epi_kernels.reference.scalars import HyperParameters, round_to_float32
from epi_kernels.reference.stats import LayerStats, ScoreTerms, score, score_terms
from epi_kernels.reference.tensors import ParamTensors
from epi_kernels.reference.threshold import KEY_END, KthSearch, score_keys
from python_tests.stage_checks import run_step, search_problem

CHUNK = 32768  # kChunk of csrc/cpu/tasks.h
SMALL = [0, 1, 7, 8, 15, 16, 17, 63, 64, 65, 511, 512, 513]
LARGE = [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 13]
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = list(itertools.product((FP32, BF16), (FP32, BF16), (None, FP32, BF16)))
SPECIAL = torch.cat(
    [
        torch.tensor(
            [0.0, -0.0, 1e-45, -1e-40, 1e-38, 1e-23, 3e38, -3e38, torch.inf, -torch.inf, torch.nan, 1.0]
        ),
        # NaNs whose payload a careless rounding carries into the sign
        torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32),
    ]
)
REFERENCE = ReferenceBackend()


def _isas() -> list[str]:
    found = []
    for isa in ("avx512", "avx2", "plain"):
        try:
            CpuBackend(isa)
        except ImportError as error:
            if "instruction set" not in str(error):
                raise
            print(f"skipped: {error}")
        else:
            found.append(isa)
    return found


@pytest.fixture(params=_isas())
def backend(request) -> CpuBackend:
    return CpuBackend(request.param)


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# --- what is compared ---------------------------------------------------------------------------


def word(x: torch.Tensor) -> torch.Tensor:
    """Bits as integers; one NaN stands for all, whose payloads no contract fixes."""
    x = torch.where(torch.isnan(x), torch.full_like(x, torch.nan), x) if x.is_floating_point() else x
    views = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}
    return x.contiguous().view(views.get(x.dtype, x.dtype))


def assert_same(expected: object, actual: object, what: str = "") -> None:
    """Tensors, and dataclasses of tensors, bit for bit."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(actual, torch.Tensor) and expected.dtype == actual.dtype
        assert torch.equal(word(expected), word(actual)), f"{what}: {expected} != {actual}"
    elif isinstance(expected, (list, tuple)):
        assert isinstance(actual, (list, tuple)) and len(expected) == len(actual)
        for i, pair in enumerate(zip(expected, actual, strict=True)):
            assert_same(*pair, f"{what}[{i}]")
    elif dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            values = getattr(expected, field.name), getattr(actual, field.name)
            assert_same(*values, f"{what}.{field.name}")
    else:
        assert expected == actual, what


def assert_same_stats(expected: LayerStats, actual: LayerStats) -> None:
    """All to the bit but the float64 moments: backends add them in different orders."""
    for name in ("minimum", "maximum", "nonfinite"):
        assert_same(getattr(expected, name), getattr(actual, name), name)
    torch.testing.assert_close(expected.moments, actual.moments, rtol=1e-12, atol=0.0)


# --- what is computed on ------------------------------------------------------------------------


def offset_by_one(x: torch.Tensor) -> torch.Tensor:
    """The same values one element into a larger buffer: no vector access to it is aligned."""
    buffer = torch.zeros(x.numel() + 1, dtype=x.dtype)
    buffer[1:] = x.reshape(-1)
    return buffer[1:].view(x.shape)


def non_contiguous(x: torch.Tensor) -> torch.Tensor:
    if x.dim() == 2:
        return x.t().contiguous().t()
    buffer = torch.zeros(2 * x.numel(), dtype=x.dtype)
    buffer[::2] = x
    return buffer[::2]


def values(n: int, dtype: torch.dtype, generator: torch.Generator, specials: bool) -> torch.Tensor:
    x = torch.randn(n, generator=generator).pow_(5) * 1e-3  # five or six decades
    if specials and n > 0:
        where = torch.randint(0, n, (max(n // 7, 1),), generator=generator)
        x[where] = SPECIAL[torch.randint(0, len(SPECIAL), where.shape, generator=generator)]
    return x.to(dtype)


def random_mask(n: int, generator: torch.Generator, kind: str) -> torch.Tensor | None:
    if kind == "none":
        return None
    share = {"empty": 0.0, "random": 0.3, "full": 1.0}[kind]
    return bits.pack(torch.rand(n, generator=generator) < share)


def make_param(
    n: int,
    param: torch.dtype = FP32,
    state: torch.dtype = FP32,
    importance: torch.dtype | None = None,
    *,
    seed: int = 0,
    mask: str = "random",
    persistent: str = "none",
    specials: bool = False,
    unaligned: bool = False,
    layout: str = "contiguous",
    **fields,
) -> ParamTensors:
    generator = torch.Generator().manual_seed(1000 * n + seed)
    item = ParamTensors(
        param=values(n, param, generator, specials),
        grad=values(n, param, generator, specials),
        exp_avg=values(n, state, generator, specials),
        exp_avg_sq=values(n, state, generator, specials).abs(),
        importance=None if importance is None else values(n, importance, generator, specials).abs(),
        isolation_mask=random_mask(n, generator, mask),
        persistent_mask=random_mask(n, generator, persistent),
        step=torch.tensor(6.0),
        hyper=HyperParameters(lr=1e-2, beta1=0.9, beta2=0.99, beta_u=0.95, eps=1e-8, weight_decay=0.1),
        rng_id=0x9ABCDEF0 + seed,
        **fields,
    )
    if unaligned:
        for name in ("param", "grad", "exp_avg", "exp_avg_sq", "importance", "isolation_mask"):
            tensor = getattr(item, name)
            setattr(item, name, None if tensor is None else offset_by_one(tensor))
    if layout == "strided":
        item.param, item.grad = non_contiguous(item.param), non_contiguous(item.grad)
    elif layout == "transposed":
        item.param = non_contiguous(item.param.view(-1, 5))
        item.grad = non_contiguous(item.grad.view(-1, 5))
    return item


def step_both(backend, items, *, layers: int = 0, with_moments: bool = False, **options) -> None:
    """Steps copies of ``items`` on both backends and compares everything a step may touch."""
    results = []
    for runner in (REFERENCE, backend):
        copies = copy.deepcopy(items)
        stats = LayerStats.empty(layers, torch.device("cpu"), with_moments=with_moments) if layers else None
        run_step(runner, copies, stats=stats, **options)
        results.append((copies, stats))
    (expected, expected_stats), (actual, actual_stats) = results
    assert_same(expected, actual, "tensors")
    for before, after in zip(items, actual, strict=True):  # isolated weights: raw bits, NaN included
        if before.isolation_mask is not None:
            keep = bits.unpack(before.isolation_mask, before.param.numel()).view(before.param.shape)
            raw = {FP32: torch.int32, BF16: torch.int16}[before.param.dtype]
            kept = before.param.contiguous().view(raw)[keep], after.param.contiguous().view(raw)[keep]
            assert torch.equal(*kept)
    if layers:
        assert_same_stats(expected_stats, actual_stats)


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


# --- refresh ------------------------------------------------------------------------------------


def refresh_items(dtype: torch.dtype, *, specials: bool, persistent: str = "none") -> list[ParamTensors]:
    """Layer 0: several tensors; 1: equal importances; 2: own importance; 3: empty; 4: never trained."""
    other = BF16 if dtype == FP32 else FP32
    items = [
        make_param(n, state=dtype, specials=specials, persistent=persistent, unaligned=i % 2 == 1)
        for i, n in enumerate((1, 7, 64, 65, 513, 3000, 0))
    ]
    equal = make_param(300, state=dtype, layer=1)
    equal.exp_avg_sq.fill_(0.25)
    own = make_param(2049, state=dtype, importance=other, layer=2, specials=specials, persistent=persistent)
    untrained = make_param(90, state=dtype, layer=4)
    untrained.exp_avg_sq.zero_()
    return [*items, equal, own, untrained]


def terms_of(items: list[ParamTensors], normalization: str) -> ScoreTerms:
    stats = LayerStats.empty(5, torch.device("cpu"), with_moments=True)
    REFERENCE.accumulate(items, stats)
    elements = torch.zeros(5, dtype=torch.int64)
    for item in items:
        elements[item.layer] += item.u.numel()
    return score_terms(stats, elements, normalization)


def new_search(k: list[int], domain: list[int], terms: ScoreTerms, keep_factor: float) -> KthSearch:
    floor = (1 << 31) + 1 if terms.positive_only else 0
    return KthSearch.start(
        search_problem(k, domain, floor=floor, end=KEY_END, bin_bits=11, keep_factor=keep_factor)
    )


SEARCHES = {
    "global": ([600], [0, 0, 0, 0, 0]),
    "layer": ([300, 3, 20, 0, 1], [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize("specials", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_accumulate(backend, dtype, specials):
    items = refresh_items(dtype, specials=specials)
    for with_moments in (False, True):
        expected, actual = (
            LayerStats.empty(5, torch.device("cpu"), with_moments=with_moments) for _ in range(2)
        )
        for _ in range(2):  # merges into what is there
            REFERENCE.accumulate(items, expected)
            backend.accumulate(items, actual)
        assert_same_stats(expected, actual)


@pytest.mark.parametrize("keep_factor", [1.0, round_to_float32(0.8)])
@pytest.mark.parametrize("scope", SEARCHES)
@pytest.mark.parametrize("normalization", ["minmax", "zscore", "none"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_refresh_gives_the_reference_bits(backend, dtype, normalization, scope, keep_factor):
    """Sample, bracket, every counting pass and the mask, histograms compared after each."""
    if normalization == "zscore" and keep_factor != 1.0:
        return  # refused by the optimizer
    items = refresh_items(dtype, specials=True, persistent="random")
    terms = terms_of(items, normalization)
    k, domain = SEARCHES[scope]
    search = new_search(k, domain, terms, keep_factor)
    elements = torch.zeros(len(k), dtype=torch.int64)
    for item in items:
        elements[domain[item.layer]] += item.u.numel()
    for attempt in range(12):
        stride = 4 if attempt == 0 else 1
        expected, actual = copy.deepcopy(search), copy.deepcopy(search)
        expected.histogram.zero_(), actual.histogram.zero_()
        REFERENCE.count(items, terms, expected, stride)
        backend.count(items, terms, actual, stride)
        assert_same(expected, actual, f"pass {attempt}")
        search = actual
        search.bracket_from_sample(elements) if attempt == 0 else search.select()
        if bool(search.done.all()):
            break
    assert bool(search.done.all())
    for thresholds in (search.threshold[domain], torch.full((5,), -torch.inf), torch.zeros(5)):
        compare_select(backend, items, terms, thresholds, keep_factor)


def compare_select(backend, items, terms, thresholds, keep_factor) -> None:
    results = []
    for runner in (REFERENCE, backend):
        copies, drift = copy.deepcopy(items), torch.full((len(thresholds), 3), 11)
        runner.select(copies, terms, thresholds, keep_factor, drift)
        results.append((copies, drift))
    assert_same(*results)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("n", SMALL + LARGE)
def test_select_writes_whole_words(backend, n, dtype):
    masks = list(itertools.product(("none", "random", "full"), ("empty", "random", "full")))
    terms = ScoreTerms(torch.zeros(5), torch.ones(5), positive_only=True)
    for persistent, mask in masks if n in SMALL else masks[4:5]:
        item = make_param(n, state=dtype, mask=mask, persistent=persistent, unaligned=n % 2 == 1)
        for threshold in (1e-9, torch.inf):
            compare_select(backend, [item], terms, torch.full((5,), threshold), 1.0)


def neighbours(dtype: torch.dtype) -> torch.Tensor:
    """Runs of eleven values an ulp apart, of either sign, and the values that are no number."""
    around = torch.tensor([1e-45, 1e-30, 2e-30, 1e-3, 0.1, 0.5, 3e38])
    bits_type = torch.int32 if dtype == FP32 else torch.int16
    words = around.to(dtype).view(bits_type).view(-1, 1) + torch.arange(-5, 6, dtype=bits_type)
    u = words.clamp_min(0).view(dtype).reshape(-1)
    return torch.cat(
        [u, -u, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan]).to(dtype)]
    )


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shift,scale", [(0.0, 1.0), (1e-3, 1e-40), (1e-30, 3e-30), (0.1, 0.0), (0.5, 3e38)])
def test_bounds_on_u_are_exact_at_every_neighbour(backend, dtype, shift, scale):
    """Brackets around the scores of single floats: one ulp of u decides between counted and skipped."""
    u = neighbours(dtype)
    item = make_param(u.numel(), state=dtype, mask="random")
    item.exp_avg_sq = u
    for positive_only, keep_factor in ((True, 1.0), (True, round_to_float32(0.7)), (False, 1.0)):
        terms = ScoreTerms(torch.tensor([shift]), torch.tensor([scale]), positive_only)
        scores = score(u[u.isfinite()].float(), terms.shift[0], terms.scale[0], None, 1.0)[5::11]
        for key, width in itertools.product(score_keys(scores).tolist(), (1, 40000)):
            search = new_search([5], [0], terms, keep_factor)
            search.lo.fill_(max(key - width, 0))
            search.hi.fill_(min(key + width, KEY_END))
            search._fit_bins()
            expected, actual = copy.deepcopy(search), copy.deepcopy(search)
            REFERENCE.count([item], terms, expected)
            backend.count([item], terms, actual)
            assert_same(expected, actual)
        for threshold in scores.tolist():
            compare_select(backend, [item], terms, torch.tensor([threshold]), keep_factor)


@pytest.mark.parametrize("n", [(1 << 21) + 13])
def test_a_tensor_large_enough_for_larger_tasks(backend, n):
    item = make_param(n, BF16, BF16, layer=0)
    step_both(backend, [item], layers=1, with_moments=True)
    terms = ScoreTerms(torch.zeros(1), torch.ones(1), positive_only=True)
    compare_select(backend, [item], terms, torch.tensor([1e-9]), 1.0)
    search = new_search([n // 100], [0], terms, 1.0)
    expected, actual = copy.deepcopy(search), copy.deepcopy(search)
    for stride in (7, 1):
        REFERENCE.count([item], terms, expected, stride)
        backend.count([item], terms, actual, stride)
    assert_same(expected, actual)


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
    results = [run_all(CpuBackend(isa), 2) for isa in _isas()]
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
