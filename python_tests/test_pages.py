"""State lies in large pages where the system gives them, and holds the same values where it does not."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from epi_kernels.optim import pages
from python_tests.harness import make, train


def flags(tensor: torch.Tensor) -> set[str]:
    """Of the mapping that holds the tensor's middle: "hg" is the hint, whether or not there were pages to give."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        first, last = (int(end, 16) for end in block.split(" ", 1)[0].split("-"))
        if first <= middle < last:
            found = re.search(r"VmFlags: (.*)", block)
            assert found is not None
            return set(found[1].split())
    raise AssertionError("no mapping holds the tensor")


def given() -> bool:
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return sys.platform == "linux" and switch.exists() and "[never]" not in switch.read_text()


@pytest.mark.skipif(not given(), reason="the system has no large pages to give")
def test_large_state_asks_for_large_pages():
    p = torch.nn.Parameter(torch.ones(1 << 24, dtype=torch.bfloat16))
    optimizer = make({"w": p}, backend="cpu", master_weight_bits=24)
    train(optimizer, {"w": p}, 1)
    for key in ("exp_avg", "exp_avg_sq", "weight_correction"):
        assert "hg" in flags(optimizer.state[p][key]), key


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1 << 20,), (1025, 1023)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_zeros_are_zeros(shape, dtype):
    made, expected = pages.zeros(shape, dtype, torch.device("cpu")), torch.zeros(shape, dtype=dtype)
    assert made.shape == expected.shape and made.dtype == dtype and made.is_contiguous()
    assert torch.equal(made, expected)


def test_a_refused_hint_changes_nothing(monkeypatch):
    monkeypatch.setattr(pages, "_MADV_HUGEPAGE", -1)  # EINVAL
    assert not pages.zeros((1 << 21,), torch.float32, torch.device("cpu")).any()
