"""The cpu backend's search for the k-th score against numpy's partition of all scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epi_kernels.backends import cpu
from epi_kernels.policies import selection
from epi_kernels.reference import bits
from epi_kernels.reference.stats import ScoreTerms
from epi_kernels.reference.tensors import ParamTensors
from epi_kernels.reference.threshold import KEY_END
from python_tests.stage_checks import search_problem
from python_tests.threads import on_threads

FP32, BF16 = torch.float32, torch.bfloat16
NOTED_KEYS = 3 << 16  # kNotedKeys of csrc/cpu/search.cpp


@pytest.fixture(scope="module")
def backend() -> cpu.CpuBackend:
    return cpu.CpuBackend()


def item(u: torch.Tensor, layer: int, isolated: torch.Tensor | None = None) -> ParamTensors:
    mask = None if isolated is None else bits.pack(isolated)
    return ParamTensors(u, None, u, u, None, mask, None, layer=layer)


def scores_of(items: list[ParamTensors], terms: ScoreTerms, keep_factor: float) -> list[np.ndarray]:
    """Finite scores of every item, by numpy alone."""
    found = []
    for one in items:
        u = one.exp_avg_sq.float().numpy()
        shift, scale = terms.shift[one.layer].numpy(), terms.scale[one.layer].numpy()
        with np.errstate(all="ignore"):
            score = np.zeros_like(u) if scale == 0 else (u - shift) / scale
            if keep_factor != 1.0 and one.isolation_mask is not None:
                old = np.unpackbits(one.isolation_mask.numpy(), bitorder="little")[: u.size].astype(bool)
                score = np.where(old, score / np.float32(keep_factor), score)
        found.append(score[np.isfinite(u)] + np.float32(0))
    return found


def check(
    backend: cpu.CpuBackend,
    items: list[ParamTensors],
    terms: ScoreTerms,
    ratio: float,
    *,
    by_layer: bool = False,
    keep_factor: float = 1.0,
    zeros: list[int] | None = None,
    bin_bits: int = 11,
) -> None:
    layers = len(terms.shift)
    zeros = zeros or [0] * layers
    domain = list(range(layers)) if by_layer else [0] * layers
    sizes = [0] * (max(domain) + 1)
    for layer, n in enumerate(zeros):
        sizes[domain[layer]] += n
    for one in items:
        sizes[domain[one.layer]] += one.exp_avg_sq.numel()
    k = [selection.selected_count(ratio, n) for n in sizes]
    floor = 1 << 31 if terms.positive_only else 0
    problem = search_problem(
        k,
        domain,
        floor=floor,
        end=KEY_END,
        bin_bits=bin_bits,
        keep_factor=keep_factor,
        n_elements=sizes,
        zeros=zeros,
    )
    threshold, count_ge = backend.find_thresholds(items, terms, problem)

    scores: list[list[np.ndarray]] = [[] for _ in sizes]
    for one, found in zip(items, scores_of(items, terms, keep_factor), strict=True):
        scores[domain[one.layer]].append(found)
    for layer, n in enumerate(zeros):
        zero = item(torch.zeros(n), layer)
        scores[domain[layer]].extend(scores_of([zero], terms, 1.0))
    for d, parts in enumerate(scores):
        values = np.concatenate(parts) if parts else np.empty(0, np.float32)
        rank = min(k[d], values.size)
        if rank == 0:
            assert math.isinf(float(threshold[d])) and int(count_ge[d]) == 0
            continue
        expected = np.partition(values, values.size - rank)[values.size - rank]
        assert float(threshold[d]) == float(expected)
        assert int(count_ge[d]) == int((values >= expected).sum())


def minmax(items: list[ParamTensors], zeros: list[int]) -> ScoreTerms:
    shift, scale = torch.zeros(len(zeros)), torch.zeros(len(zeros))
    for layer, n in enumerate(zeros):
        parts = [one.exp_avg_sq.float() for one in items if one.layer == layer]
        u = torch.cat([*parts, torch.zeros(n)])
        u = u[u.isfinite()]
        if u.numel():
            shift[layer], scale[layer] = u.min(), u.max() - u.min()
    return ScoreTerms(shift, scale, positive_only=True)


def importances(n: int, generator: torch.Generator, kind: str) -> torch.Tensor:
    """What makes a search hard: ties, runs of equals, steps, tails, no spread."""
    u = torch.rand(n, generator=generator)
    if kind == "decades":
        return u.mul(40).sub(30).exp()
    if kind == "rows":  # neighbours alike: a sample of runs knows less than it seems
        row = torch.rand(-(-n // 4096), generator=generator).pow(8).repeat_interleave(4096)[:n]
        return row * (0.999 + 0.001 * u)
    if kind == "few-values":
        return u.mul(5).floor()
    if kind == "two-levels":  # half of a percent stands far above the rest
        return torch.where(u < 0.005, 1e6 + u, u * 1e-6)
    if kind == "equal":
        return torch.full((n,), 0.25)
    if kind == "nonfinite":
        return torch.where(u < 0.3, torch.tensor(torch.nan), torch.where(u < 0.4, torch.inf, u))
    if kind == "sorted":
        return u.sort().values
    assert kind == "uniform"
    return u


KINDS = ["uniform", "decades", "rows", "few-values", "two-levels", "equal", "nonfinite", "sorted"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("ratio", [1e-5, 0.01, 0.3, 0.999])
def test_large_searches(backend, kind, dtype, ratio):
    """Past both samples, past the room for noted keys, and past wrong brackets."""
    generator = torch.Generator().manual_seed(3)
    items = [
        item(importances(n, generator, kind).mul(scale).to(dtype), layer)
        for layer, (n, scale) in enumerate([(NOTED_KEYS * 3 + 5, 1.0), (70_001, 1e-5), (33, 1e3)])
    ]
    for zeros, by_layer in (([0, 12_345, 7], False), ([0, 0, 0], True)):
        check(backend, items, minmax(items, zeros), ratio, zeros=zeros, by_layer=by_layer)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_find_the_same(backend, threads):
    with on_threads(threads):
        items = [item(importances(400_000, torch.Generator().manual_seed(1), "rows"), 0)]
        check(backend, items, minmax(items, [0]), 0.02)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_search(backend, data):
    """Small ones sampled as large ones are, with few bins, so that every turn of the search is taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "SAMPLE_FROM_ELEMENTS", data.draw(st.sampled_from([1, 1 << 10, 1 << 60])))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
        layers = data.draw(st.integers(1, 4))
        dtype = data.draw(st.sampled_from([FP32, BF16]))
        keep_factor = data.draw(st.sampled_from([1.0, selection.keep_factor(0.3)]))
        items = []
        for _ in range(data.draw(st.integers(0, 5))):
            n = data.draw(st.sampled_from([1, 63, 64, 65, 1000, 40_000]))
            u = importances(n, generator, data.draw(st.sampled_from(KINDS)))
            u = u.mul(10.0 ** data.draw(st.integers(-30, 20))).to(dtype)
            isolated = torch.rand(n, generator=generator) < 0.2 if data.draw(st.booleans()) else None
            items.append(item(u, data.draw(st.integers(0, layers - 1)), isolated))
        zeros = [data.draw(st.sampled_from([0, 3, 5000])) for _ in range(layers)]
        terms = minmax(items, zeros)
        if keep_factor == 1.0 and data.draw(st.booleans()):  # zscore
            terms = ScoreTerms(terms.shift + terms.scale / 3, terms.scale / 7, positive_only=False)
        check(
            backend,
            items,
            terms,
            data.draw(st.sampled_from([0.0, 0.001, 0.01, 0.5, 0.99])),
            by_layer=data.draw(st.booleans()),
            keep_factor=keep_factor,
            zeros=zeros,
            bin_bits=data.draw(st.sampled_from([1, 4, 8, 11])),
        )
