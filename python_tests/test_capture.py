"""Steps captured in a CUDA graph, played with Triton's interpreter: launches are noted, then run again and again.

As a graph does, a noted launch keeps its arguments: addresses, numbers and tables are those of the capture.
"""

from __future__ import annotations

import copy

import pytest
import torch

from epi_kernels import MaskedEMAAdamW
from epi_kernels.backends import capture
from python_tests.harness import need_triton

need_triton()

from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

SIZES = {"a": (33, 7), "b": (130,), "c": (4,)}


class Graph:
    """Use as a context manager to capture; ``replay`` runs what was launched meanwhile."""

    def __init__(self, monkeypatch):
        self._launches, self._patch = [], monkeypatch

    def __enter__(self):
        self._context = self._patch.context()
        patch = self._context.__enter__()
        launch = InterpretedFunction.__getitem__

        def noted(kernel, grid):
            run = launch(kernel, grid)
            return lambda *arguments, **options: self._launches.append((run, arguments, options))

        patch.setattr(InterpretedFunction, "__getitem__", noted)
        patch.setattr(capture, "capturing", lambda: True)
        return self

    def __exit__(self, *_):
        self._context.__exit__(None, None, None)
        assert self._launches

    def replay(self):
        for run, arguments, options in self._launches:
            run(*arguments, **options)


def made(dtype, device="cpu", **options):
    generator = torch.Generator().manual_seed(0)
    params = {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        for name, shape in SIZES.items()
    }
    for param in params.values():
        param.grad = torch.zeros_like(param)
    lr = torch.tensor(1e-2, device=device)
    chosen = {"isolation_ratio": 0.1, "mask_interval": None, "weight_decay": 0.1} | options
    return params, lr, MaskedEMAAdamW(params.items(), lr=lr, backend="triton", **chosen)


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params.values():
        param.grad.copy_(torch.randn(param.shape, generator=generator))


def contents(params, optimizer):
    state = optimizer.state_dict()
    tensors = {name: param.detach().clone() for name, param in params.items()}
    for number, entry in state["state"].items():
        tensors |= {(number, key): value.clone() for key, value in entry.items()}
    return tensors, optimizer.param_groups[0]["isolation_step"]


def differing(one, other):
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]


CASES = {
    "float32": (torch.float32, {}),
    "bfloat16, own importance": (torch.bfloat16, {"importance_beta": 0.9}),
    "8-bit states": (torch.bfloat16, {"state_dtype": "int8"}),
}


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_have_the_bits_of_eager_ones(case, monkeypatch):
    """lr moves between replays, a refresh comes in between, and a step's random numbers and scalars go on."""
    dtype, options = CASES[case]
    runs = []
    for capturable, captured in ((False, False), (True, False), (True, True)):
        params, lr, optimizer = made(dtype, capturable=capturable, **options)
        graph = Graph(monkeypatch)
        for step in range(6):
            set_gradients(params, step)
            lr.fill_(0.01 / (1 + step))
            if not captured or step < 2:
                optimizer.step()
            else:
                if step == 2:
                    before = contents(params, optimizer)
                    with graph:
                        optimizer.step()
                    assert differing(contents(params, optimizer)[0], before[0]) == []  # noted, not run
                    assert optimizer.param_groups[0]["isolation_step"] == 2
                graph.replay()
            if step == 3:
                report = optimizer.refresh_isolation_mask()
                assert report.step == 4 and report.isolated > 0
        runs.append(contents(params, optimizer))
    for tensors, isolation_step in runs[1:]:
        assert differing(tensors, runs[0][0]) == [] and isolation_step == runs[0][1] == 6


def test_a_loss_scale_and_an_overflow_are_seen_by_replays(monkeypatch):
    runs = []
    for captured in (False, True):
        params, _, optimizer = made(torch.float32, capturable=True)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        graph = Graph(monkeypatch)
        for step, overflow in enumerate((0.0, 0.0, 1.0, 0.0)):
            set_gradients(params, step)
            optimizer.grad_scale.fill_(2.0**step)
            optimizer.found_inf.fill_(overflow)
            if not captured or step == 0:
                optimizer.step()
                continue
            if step == 1:
                with graph:
                    optimizer.step()
            graph.replay()
        runs.append(contents(params, optimizer))
    assert differing(runs[0][0], runs[1][0]) == [] and runs[0][1] == runs[1][1] == 3


def test_a_mask_set_by_hand_acts_in_replays(monkeypatch):
    params, _, optimizer = made(torch.float32, capturable=True, isolation_ratio=0.0)
    graph = Graph(monkeypatch)
    set_gradients(params, 0)
    optimizer.step()
    with graph:
        optimizer.step()
    optimizer.set_isolation_mask(params["b"], torch.ones(130, dtype=torch.bool))
    before = {name: param.detach().clone() for name, param in params.items()}
    graph.replay()
    assert torch.equal(params["b"], before["b"]) and not torch.equal(params["a"], before["a"])


def refused(optimizer, monkeypatch) -> str:
    """What a capture is told; nothing may have changed."""
    before = copy.deepcopy(optimizer.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(capture, "capturing", lambda: True)
        with pytest.raises(RuntimeError) as told:
            optimizer.step()
    assert str(optimizer.state_dict()) == str(before)
    return str(told.value)


def test_what_a_capture_needs_is_said_before_anything_is_noted(monkeypatch):
    params, _, optimizer = made(torch.float32, capturable=True)
    assert "take one with the same parameters and gradients" in refused(optimizer, monkeypatch)
    optimizer.step()
    params["a"].grad = torch.zeros_like(params["a"])  # elsewhere in memory
    assert "have changed since the last step" in refused(optimizer, monkeypatch)
    params["a"].grad = None
    assert "take one with the same parameters and gradients" in refused(optimizer, monkeypatch)
    plain = made(torch.float32)[2]
    plain.step()
    assert "make the optimizer with capturable=True" in refused(plain, monkeypatch)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backends_that_cannot_be_captured_are_refused(backend):
    with pytest.raises(NotImplementedError, match=f"capturable=True: the {backend} backend"):
        MaskedEMAAdamW([torch.nn.Parameter(torch.ones(3))], capturable=True, backend=backend)


@pytest.mark.parametrize("lr", [torch.tensor(0.01, dtype=torch.float64), torch.tensor([0.1, 0.2])])
def test_an_lr_that_a_graph_cannot_read_is_refused(lr):
    with pytest.raises(ValueError, match="lr must be"):
        optimizer = MaskedEMAAdamW(
            [torch.nn.Parameter(torch.ones(3))], lr=lr, capturable=True, backend="triton"
        )
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        optimizer.step()
