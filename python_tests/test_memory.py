"""Peak memory of a refresh, C++ temporaries included: at most 1 MiB above the step's (guarantee 8)."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Its own process: the peak of resident memory can be reset and read, and nothing else allocates meanwhile.
WORKER = """
import gc, sys, torch
from epi_kernels import MaskedEMAAdamW

backend, n, parameters, scope = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
state_dtype = None if sys.argv[5] == "float32" else sys.argv[5]
torch.set_num_threads(2)
params = [torch.nn.Parameter(torch.ones(n // parameters)) for _ in range(parameters)]
for p in params:
    p.grad = torch.rand_like(p)
optimizer = MaskedEMAAdamW(
    params, backend=backend, isolation_ratio=0.01, mask_interval=3, scope=scope, state_dtype=state_dtype
)
gc.disable()

def peak_kib():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])

for _ in range(6):  # two refreshes load and touch whatever is loaded and touched once
    optimizer.step()
peaks = []
for _ in range(3):
    open("/proc/self/clear_refs", "w").write("5")
    optimizer.step()
    peaks.append(peak_kib())
report = optimizer.isolation_report()
assert report.step == 9 and report.isolated >= int(0.01 * n) - parameters, (report, n)
open("/proc/self/clear_refs", "w").write("5")
optimizer.refresh_isolation_mask()
peaks.append(peak_kib())
print(*peaks)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def _growth_kib(backend: str, n: int, parameters: int, scope: str, states: str = "float32") -> int:
    command = [sys.executable, "-c", WORKER, backend, str(n), str(parameters), scope, states]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    step_1, step_2, with_refresh, by_hand = map(int, done.stdout.split())
    return max(with_refresh, by_hand) - max(step_1, step_2)


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize(
    ("parameters", "scope", "states"),
    [(1, "global", "float32"), (20, "global", "float32"), (20, "layer", "float32"), (20, "layer", "int8")],
)
def test_8_peak_of_a_refresh(backend: str, parameters: int, scope: str, states: str):
    assert _growth_kib(backend, 10_000_000, parameters, scope, states) <= 1024


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [1, 300])
def test_8_peak_of_a_refresh_at_1e8(parameters: int):
    assert _growth_kib("cpu", 100_000_000, parameters, "global") <= 1024
