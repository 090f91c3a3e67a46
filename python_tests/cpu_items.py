"""What the cpu backend's tests compute on and compare: every size, dtype and layout, special values among them."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import torch

from epi_kernels.backends.cpu import CpuBackend
from epi_kernels.backends.reference import ReferenceBackend
from epi_kernels.reference import bits
from epi_kernels.reference.scalars import HyperParameters
from epi_kernels.reference.stats import LayerStats, ScoreTerms, score_terms
from epi_kernels.reference.tensors import ParamTensors
from epi_kernels.reference.threshold import KEY_END, KthSearch
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


def isas() -> list[str]:
    """The instruction sets this processor has."""
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
