"""Tests on a device: `pytest -m gpu`. They need pytest, numpy and torch, nothing else.

`--device cpu` plays them on the CPU with the backends that run there, so that a machine without a
GPU finds their mistakes; `--backend NAME` picks one.
"""

from __future__ import annotations

import pytest
import torch

from epi_kernels.backends import dispatch

BACKENDS = ("triton", "cuda", "reference", "cpu")


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda", help="cuda, or cpu to play the tests without a GPU")
    parser.addoption("--backend", choices=BACKENDS, help="only this one")


@pytest.fixture
def device(request) -> torch.device:
    # the option is unknown where pytest met this folder only after it had read its arguments
    wanted = torch.device(request.config.getoption("--device", "cuda"))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return wanted


def pytest_generate_tests(metafunc):
    if "backend" not in metafunc.fixturenames:
        return
    chosen = metafunc.config.getoption("--backend", None)
    on_cpu = metafunc.config.getoption("--device", "cuda") == "cpu"
    fitting = ["cpu", "reference"] if on_cpu else ["triton", "cuda", "reference"]
    metafunc.parametrize("backend", [chosen] if chosen else fitting, indirect=True)


@pytest.fixture
def backend(request, device):
    """Every backend of the device; one that ought to run there and cannot is a failure."""
    loaded = dispatch.load(request.param)
    if isinstance(loaded, str):
        pytest.fail(f"{request.param}: {loaded}")
    refusal = loaded.refuses(device, torch.float32)
    assert refusal is None, f"{request.param}: {refusal}"
    return loaded
