"""CUDA graphs: captured and eager steps give the same bits. `test_capture.py` plays the same with the interpreter."""

from __future__ import annotations

import pytest
import torch

from python_tests.test_capture import CASES, contents, differing, made, set_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device"),
]
STEPS, WARM = 8, 3


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_have_the_bits_of_eager_ones(case):
    dtype, options = CASES[case]
    runs = []
    for captured in (False, True):
        params, lr, optimizer = made(dtype, "cuda", capturable=True, **options)
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        for step in range(STEPS):
            set_gradients(params, step)
            lr.fill_(0.01 / (1 + step))
            if captured and step >= WARM:
                if step == WARM:
                    torch.cuda.synchronize()
                    with torch.cuda.graph(graph):
                        optimizer.step()
                graph.replay()
            elif captured:  # as torch's notes on CUDA graphs have it
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    optimizer.step()
                torch.cuda.current_stream().wait_stream(side)
            else:
                optimizer.step()
            if step == STEPS - 3:
                assert optimizer.refresh_isolation_mask().isolated > 0
        runs.append(contents(params, optimizer))
    assert differing(runs[0][0], runs[1][0]) == [] and runs[0][1] == runs[1][1] == STEPS
