"""offload="cpu" on simulated devices: the bits of the un-offloaded run, whatever is offloaded and however it is released."""

from __future__ import annotations

import time

import pytest
import torch

from epi_kernels import AdaptiveInterval, AdaptiveRatio, MaskedEMAAdamW, enable_gradient_release
from epi_kernels.optim.offload import pipeline
from python_tests.released_net import Net, assert_same, loss_of, optimizer_of, train
from python_tests.simulated_device import simulated  # noqa: F401

pytestmark = pytest.mark.usefixtures("simulated")


def halves(name: str) -> str:
    return "one" if name < "first.bias" else "other"


LONG = {
    "float32": (torch.float32, {}),
    "bfloat16, exact copy of the weights": (torch.bfloat16, {"master_weight_bits": 32}),
    "8-bit": (torch.bfloat16, {"state_dtype": "int8", "importance_beta": 0.9, "importance_dtype": "int8"}),
}
OPTIONS = {
    "zscore over several parameters": {"normalization": "zscore", "layer_key": halves},
    "none, by layer": {"normalization": "none", "scope": "layer", "hysteresis": 0.3},
    "own importance": {"importance_beta": 0.9, "importance_dtype": torch.bfloat16, "mask_warmup": 5},
    "24-bit weights": {"master_weight_bits": 24, "state_dtype": torch.float32},
    "schedules": {
        "isolation_ratio": AdaptiveRatio(0.1, 0.02, 0.3),
        "mask_interval": AdaptiveInterval(2, 1, 4),
    },
    "plain AdamW": {"isolation_ratio": 0.0},
    "reference backend": {"backend": "reference"},
}
BOTH = pytest.mark.parametrize("released", [False, True], ids=["at once", "released"])


def run(dtype, steps, offload, *, released, backwards=1, **options):
    """(optimizer, reports of its refreshes)"""
    net = Net(dtype)
    optimizer = optimizer_of(net, offload=offload, **options)
    if released:
        enable_gradient_release(net, optimizer, accumulation_steps=backwards)
    return optimizer, train(net, optimizer, steps, backwards=backwards)


def assert_same_runs(resident, offloaded) -> None:
    assert_same(resident[0], offloaded[0])
    assert resident[1] == offloaded[1]


def pair(dtype, steps, **options):
    """A run on the device and an offloaded one agree. Returns their reports."""
    runs = [run(dtype, steps, offload, **options) for offload in (None, "cpu")]
    assert_same_runs(*runs)
    return runs[1][1]


@pytest.mark.parametrize(("dtype", "options"), LONG.values(), ids=LONG.keys())
def test_two_hundred_steps(dtype, options):
    options = {"mask_interval": 7, "isolation_ratio": 0.2, **options}
    resident = run(dtype, 200, None, released=False, **options)
    assert len(resident[1]) == 200 // 7 and all(report["isolated"] for report in resident[1])
    for released in (False, True):
        assert_same_runs(resident, run(dtype, 200, "cpu", released=released, **options))


@BOTH
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options, released):
    reports = pair(torch.bfloat16, 9, released=released, **options)
    assert reports or options == OPTIONS["plain AdamW"]


@BOTH
def test_accumulated_gradients(released):
    pair(torch.float32, 7, released=released, backwards=3)


def test_float64_weights_step_on_the_reference_backend():
    pair(torch.float64, 5, released=True, backend="auto")


def test_several_groups_with_a_scheduler_and_a_closure():
    runs = []
    for offload in (None, "cpu"):
        net = Net(torch.bfloat16)
        named = list(net.named_parameters())
        groups = [
            {"params": named[:3], "lr": torch.tensor(1e-2)},
            {"params": named[3:5], "isolate": False, "betas": (0.8, 0.9), "maximize": True},
            {"params": named[5:], "weight_decay": 0.0},
        ]
        optimizer = MaskedEMAAdamW(groups, mask_interval=2, isolation_ratio=0.2, offload=offload)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 4)
        for step in range(7):

            def closure(step=step, net=net, optimizer=optimizer):
                optimizer.zero_grad()
                loss = loss_of(net, step)
                loss.backward()
                return loss

            assert optimizer.step(closure).item() > 0
            scheduler.step()
        runs.append(optimizer)
    assert_same(*runs)


def test_awkward_layouts():
    """Weights and gradients that are not row-major, a lazily negated gradient, a parameter without one."""
    runs = []
    for offload in (None, "cpu"):
        torch.manual_seed(0)
        params = {
            "transposed": torch.nn.Parameter(torch.randn(6, 50).t()),
            "plain": torch.nn.Parameter(torch.randn(33)),
            "never": torch.nn.Parameter(torch.randn(5)),
            "scalar": torch.nn.Parameter(torch.randn(())),
        }
        optimizer = MaskedEMAAdamW(params.items(), mask_interval=2, isolation_ratio=0.2, offload=offload)
        for _ in range(5):
            params["transposed"].grad = torch.randn(50, 6)
            params["plain"].grad = torch._neg_view(torch.randn(33))
            params["scalar"].grad = torch.randn(())
            optimizer.step()
        runs.append(optimizer)
    assert_same(*runs)


def test_loss_scaling():
    """Steps that found_inf skips count nothing, and the unscaled gradient comes back to .grad."""
    runs, grads = [], []
    for offload in (None, "cpu"):
        net = Net()
        optimizer = optimizer_of(net, offload=offload)
        for step in range(8):
            loss_of(net, step).backward()
            for param in net.parameters():
                if param.grad is not None:
                    param.grad *= 1024
            optimizer.grad_scale = torch.tensor(1024.0)
            optimizer.found_inf = torch.tensor(float(step in (1, 4)))
            optimizer.step()
            grads.append([None if p.grad is None else p.grad.clone() for p in net.parameters()])
            optimizer.zero_grad()
        assert optimizer.param_groups[0]["isolation_step"] == 6
        runs.append(optimizer)
    assert_same(*runs)
    for one, other in zip(grads[:8], grads[8:], strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_weights_that_the_user_sets_are_heard():
    runs = []
    for offload in (None, "cpu"):
        net = Net()
        optimizer = optimizer_of(net, offload=offload)
        train(net, optimizer, 3)
        with torch.no_grad():
            net.first.weight.data.mul_(0.5)  # no version counter sees it
        train(net, optimizer, range(3, 5))
        runs.append(optimizer)
    assert_same(*runs)


def test_a_saved_weight_that_is_stepped_is_noticed():
    """autograd's own check, as of a step on the device."""
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = MaskedEMAAdamW([weight], offload="cpu")
    loss = (weight * weight).sum()
    weight.grad = torch.ones(4)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@BOTH
def test_an_interrupt_leaves_nothing_on_its_way(monkeypatch, released):
    """Ctrl-C while step() waits: weights that are set after it stay as they are set, and states are what was stepped."""

    def slow(self, wait, job):
        time.sleep(0.01)
        back(self, wait, job)

    back, result = pipeline.HostPipeline._return, pipeline.Future.result
    monkeypatch.setattr(pipeline.HostPipeline, "_return", slow)
    monkeypatch.setattr(pipeline, "STAGING_BYTES", 1 << 20)
    net = Net()
    optimizer = optimizer_of(net, offload="cpu")
    if released:
        enable_gradient_release(net, optimizer)
    loss_of(net, 0).backward()
    pressed = []

    def interrupted(self, timeout=None):
        if not pressed:
            pressed.append(True)
            raise KeyboardInterrupt
        return result(self, timeout)

    monkeypatch.setattr(pipeline.Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    with torch.no_grad():
        for param in net.parameters():
            param.fill_(7.0)
    time.sleep(0.3)
    assert all((param == 7).all() for param in net.parameters())
    assert not optimizer._pipeline._running


def test_the_ring_is_made_anew_for_a_device_that_comes_later():
    """Of a model that was moved, or lies on both: from memory that is not pinned no copy is asynchronous."""
    weight, device = torch.zeros(4), torch.device("cuda", 0)
    ways = pipeline.HostPipeline([weight])

    def ring_after_a_step():
        ways.submit(weight, torch.ones(4), lambda weight, grad: weight.add_(grad), writes_grad=False)
        ways._link(device)  # that of the next weight
        ways.drain()
        return ways._staging

    assert ring_after_a_step() is None
    ring = ring_after_a_step()
    assert ring is not None and ring_after_a_step() is ring and (weight == 3).all()
