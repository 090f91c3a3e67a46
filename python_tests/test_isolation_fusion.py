"""Fusion against numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epi_kernels.isolation import (
    MemoryCore,
    checkpoints,
    fuse,
    fusion,
)
from epi_kernels.isolation.fusion import EPS, fold
from python_tests import oracle_isolation as oracle
from python_tests.fused_models import SHAPES, models, split

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# of a fused value, in units of the dtype's own precision: one rounding to it, a few of float32 before
ROUNDINGS = 0.51


def assert_close(fused: torch.Tensor, expected: np.ndarray, dtype, what: str) -> None:
    info = torch.finfo(dtype)
    unit = np.maximum(np.abs(expected) * info.eps, info.smallest_normal)
    float32 = 4 * np.max(np.abs(expected), initial=0.0) * torch.finfo(torch.float32).eps
    if dtype == torch.float64:
        unit, float32 = 64 * unit, 1e-12
    error = np.abs(fused.double().numpy().reshape(-1) - expected)
    assert np.all(error <= ROUNDINGS * unit + float32), (what, error.max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["slerp", "linear"])
@pytest.mark.parametrize(("tasks", "omega"), [(1, 0.3), (1, None), (3, 0.3), (3, None), (2, 0.0), (2, 1.0)])
def test_fusion_is_that_of_numpy(monkeypatch, dtype, method, tasks, omega):
    monkeypatch.setattr(checkpoints, "SLICE", 64)
    base, tuned = models(tasks, dtype)
    vectors = [oracle.core(base, one, 0.05) for one in tuned]
    cores = [MemoryCore.from_bools(split(vector)) for vector in vectors]
    fused, report = fuse(base, tuned, cores, method=method, omega=omega)
    expected = oracle.fuse(base, tuned, vectors, method, omega, EPS)
    for name in SHAPES:
        assert fused[name].dtype == dtype and fused[name].shape == base[name].shape
        assert_close(fused[name], expected[name], dtype, name)
    for i, vector in enumerate(vectors):  # the last core to hold an element decides, and its bits stay
        decided = vector & ~np.any(vectors[i + 1 :], axis=0) if i + 1 < tasks else vector
        for name, mask in split(decided).items():
            assert torch.equal(fused[name][mask], tuned[i][name][mask]), name
    assert report.core_elements == np.any(vectors, axis=0).sum()
    assert report.elements == vectors[0].size
    assert report.slerp + report.linear == tasks * len(SHAPES)
    if method == "slerp" and omega == 0.3:
        assert report.slerp > 0 and report.linear > 0
        cosine = float(oracle.flat({"w": base["w"]}) @ oracle.flat({"w": tuned[0]["w"]}))
        cosine /= np.linalg.norm(oracle.flat({"w": base["w"]})) * np.linalg.norm(
            oracle.flat({"w": tuned[0]["w"]})
        )
        assert report.angles["w"][0] == pytest.approx(math.acos(cosine), abs=1e-7)
        assert math.isnan(report.angles["zero"][0])
    if method == "linear":
        assert report.slerp == 0 and report.angles == {}


@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(0, 1), st.sampled_from([0.0, EPS, 0.5, 3.0]))
def test_fusion_of_any_vectors(seed, tasks, omega, eps):
    """Spread over all angles, near 0 and near pi too."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 9))
    first = rng.standard_normal(n)
    base = {"w": torch.from_numpy(first)}
    tuned = []
    for _ in range(tasks):
        near = rng.choice([1.0, -1.0, 0.0]) * first
        spread = rng.choice([0.0, 1e-3, 1.0]) * rng.standard_normal(n)
        tuned.append({"w": torch.from_numpy(near + spread)})
    vectors = [rng.random(n) < 0.2 for _ in range(tasks)]
    cores = [MemoryCore.from_bools({"w": torch.from_numpy(vector)}) for vector in vectors]
    fused, report = fuse(base, tuned, cores, omega=omega, eps=eps)
    # Where an angle lies at a bound the two may fall on either side of it.
    angles = [angle for angle in report.angles["w"] if not math.isnan(angle)]
    bounds = (0.0, eps, math.pi - max(eps, fusion.OPPOSITE), math.pi)
    if any(abs(angle - bound) < 1e-5 for angle in angles for bound in bounds):
        return
    expected = oracle.fuse(base, tuned, vectors, "slerp", omega, eps)["w"]
    scale = max(1.0, np.abs(expected).max()) * max([1.0, *(1 / math.sin(one) for one in angles)])
    np.testing.assert_allclose(fused["w"].numpy(), expected, rtol=0, atol=1e-9 * scale)


def test_slerp_keeps_the_norm_and_halves_the_angle():
    base, tuned = {"w": torch.tensor([1.0, 0.0])}, [{"w": torch.tensor([0.0, 1.0])}]
    fused, _ = fuse(base, tuned, omega=0.5)
    torch.testing.assert_close(fused["w"], torch.tensor([0.5**0.5, 0.5**0.5]))
    fused, _ = fuse(base, tuned, omega=0.5, method="linear")
    assert fused["w"].tolist() == [0.5, 0.5]


def test_edges_of_a_fold():
    assert fold(0.25, EPS * 0.999, EPS) == (0.75, 0.25, False)
    assert fold(0.25, EPS, EPS)[2] and fold(0.25, 1e-5, 0.0)[2]
    for theta in (0.0, math.nan, math.pi, math.pi - 1e-9):
        assert fold(0.25, theta, 0.0) == (0.75, 0.25, False)
    a, b, _ = fold(0.25, EPS, EPS)  # at the bound both formulas agree
    assert a == pytest.approx(0.75, rel=1e-3) and b == pytest.approx(0.25, rel=1e-3)


def test_equal_shares_are_the_mean_in_any_order():
    base, tuned = models(3, torch.float64)
    one, _ = fuse(base, tuned, method="linear")
    other, _ = fuse(base, tuned[::-1], method="linear")
    for name in SHAPES:
        mean = sum(model[name] for model in (base, *tuned)) / 4
        torch.testing.assert_close(one[name], mean)
        torch.testing.assert_close(other[name], mean)
