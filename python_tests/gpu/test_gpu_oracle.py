"""Whole optimizer runs on the device against the numpy oracle, bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from python_tests.cases import CASES, GRADIENT_KINDS, Spec, case
from python_tests.harness import Pair, Target
from python_tests.oracle import Hyper

pytestmark = pytest.mark.gpu


@pytest.fixture
def target(backend, device) -> Target:
    return Target(backend.name, device.type)


def unaligned(chosen):
    """The case with every parameter and gradient one element off its allocation's start."""
    groups = tuple(
        (
            hyper,
            tuple(dataclasses.replace(spec, layout="unaligned", grad_layout="unaligned") for spec in specs),
        )
        for hyper, specs in chosen.groups
    )
    return dataclasses.replace(chosen, groups=groups)


@pytest.mark.parametrize("offset", ["as-is", "off-by-one"])
@pytest.mark.parametrize("name", CASES)
def test_named_case(name, offset, target):
    pair = Pair(CASES[name] if offset == "as-is" else unaligned(CASES[name]), target)
    specs = pair.case.specs
    for kinds in (["normal"] * len(specs), ["spread"], ["ties", "sparse"], ["normal", None, "small"]):
        pair.step(pair.gradients([kinds[i % len(kinds)] for i in range(len(specs))]))
        pair.check()
    pair.refresh()
    pair.check()


@pytest.mark.parametrize("kind", GRADIENT_KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_every_kind(kind, dtype, target):
    specs = [Spec((33, 17), dtype), Spec((70_001,), dtype), Spec((71,), dtype, "unaligned", "unaligned")]
    pair = Pair(case(*specs, isolation_ratio=0.2, mask_interval=2, hyper=Hyper(importance_beta=0.9)), target)
    for _ in range(4):
        pair.step(pair.gradients([kind] * 3))
        pair.check()


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("hysteresis", [0.0, 0.3])
@pytest.mark.parametrize("normalization", ["minmax", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masks_of_several_chunks(dtype, normalization, hysteresis, scope, target):
    specs = [Spec((n,), dtype) for n in (65_535, 65_537, 200_003, 9)]
    arguments = {"normalization": normalization, "hysteresis": hysteresis, "scope": scope}
    pair = Pair(case(*specs, isolation_ratio=0.05, mask_interval=2, mask_warmup=1, **arguments), target)
    for kind in ("normal", "spread", "sparse", "small"):
        pair.step(pair.gradients([kind] * len(specs)))
        pair.check()


def test_sampled_bracket(target):
    """Above a million elements the search starts from a sample."""
    pair = Pair(case(Spec((1 << 20,)), Spec((300_003,), "bfloat16"), mask_interval=1), target)
    for kind in ("spread", "normal", "ties"):
        pair.step(pair.gradients([kind] * 2))
        pair.check()


@pytest.mark.parametrize("scale", [65536.0, 3.0])
def test_grad_scale_and_found_inf(scale, target):
    pair = Pair(case(Spec((33, 17)), Spec((7,), "bfloat16"), isolation_ratio=0.1, mask_interval=2), target)
    for found_inf in (False, True, False):
        pair.step(pair.gradients(["normal", "small"]), grad_scale=scale, found_inf=found_inf)
        pair.check()


def test_forty_steps(target):
    """Many refreshes, enough parameters that their rows share a table."""
    specs = [Spec((n,), dtype) for n in (5, 300, 4097) for dtype in ("float32", "bfloat16")] * 3
    pair = Pair(case(*specs, isolation_ratio=0.1, mask_interval=5, hysteresis=0.2), target)
    for _ in range(40):
        pair.step(pair.gradients(["small"] * len(specs)))
    pair.check()


def test_auto_chooses_what_the_device_is_for(device):
    from epi_kernels.backends import choose

    names = {choose("auto", device, dtype).backend.name for dtype in (torch.float32, torch.bfloat16)}
    assert names == ({"triton"} if device.type == "cuda" else {"cpu"})
