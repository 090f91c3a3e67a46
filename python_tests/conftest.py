"""Which backends a test meets, and how hypothesis behaves."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

# Before anything imports triton: without a device its kernels run through the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from python_tests.harness import TARGETS, Target
from python_tests.threads import on_threads

# The same examples in every run, whatever the machine's speed; `--hypothesis-profile=explore` looks further.
hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, database=None, print_blob=True, max_examples=30
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    if config.getoption("--runslow") and config.option.markexpr == "not slow":
        config.option.markexpr = ""


@pytest.fixture(params=TARGETS, ids=str)
def target(request) -> Target:
    """Every backend that can run here. A skip names why; one that ought to run here fails instead."""
    chosen: Target = request.param
    with chosen.active():
        reason = chosen.unavailable()
        if reason is not None:
            (pytest.fail if chosen.must_run else pytest.skip)(f"{chosen}: {reason}")
        yield chosen


@pytest.fixture
def one_thread():
    """Small models only lose by a second thread, and test processes share the cores."""
    with on_threads(1):
        yield


@pytest.fixture
def two_threads():
    """Whatever the machine has; what a kernel computes does not depend on it."""
    with on_threads(2):
        yield


@pytest.fixture(autouse=True)
def _choices_do_not_outlive_a_test():
    """A test that puts another backend in place must not decide what later tests step with."""
    yield
    from epi_kernels.backends import dispatch

    dispatch.choose.cache_clear()
