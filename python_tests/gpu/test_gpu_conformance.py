"""torch's conformance cases of every backend that runs on a GPU; they need expecttest. See test_torch_conformance.py."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("expecttest", reason="torch's harness for optimizers needs it")

from torch.testing._internal.common_device_type import instantiate_device_type_tests

from python_tests.test_torch_conformance import Cases as TestOptimizers

pytestmark = pytest.mark.gpu

if torch.cuda.is_available():
    instantiate_device_type_tests(TestOptimizers, globals(), only_for="cuda")
else:
    del TestOptimizers
