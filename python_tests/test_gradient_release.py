"""Gradient release: the bits of a step over all gradients at once, with one gradient alive at a time."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from epi_kernels import AdaptiveInterval, AdaptiveRatio, MaskedEMAAdamW, enable_gradient_release
from epi_kernels.optim import stepping
from python_tests.released_net import Net, assert_same, loss_of, optimizer_of, train


def halves(name: str) -> str:
    return "one" if name < "first.bias" else "other"


OPTIONS = {
    "minmax": {},
    "zscore over several parameters": {"normalization": "zscore", "layer_key": halves},
    "none, by layer": {"normalization": "none", "scope": "layer", "hysteresis": 0.3},
    "4-bit states": {"state_dtype": "int4"},
    "8-bit states": {"state_dtype": "int8", "importance_beta": 0.9, "importance_dtype": "int8"},
    "own importance": {"importance_beta": 0.9, "importance_dtype": torch.bfloat16, "mask_warmup": 5},
    "schedules": {
        "isolation_ratio": AdaptiveRatio(0.1, 0.02, 0.3),
        "mask_interval": AdaptiveInterval(2, 1, 4),
    },
    "plain AdamW": {"isolation_ratio": 0.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", torch.float32), ("cpu", torch.bfloat16), ("reference", torch.float32)]
)
def test_bits_are_those_of_one_step(options, backend, dtype):
    runs = []
    for released in (False, True):
        net = Net(dtype)
        optimizer = optimizer_of(net, backend=backend, **options)
        if released:
            enable_gradient_release(net, optimizer)
        runs.append((optimizer, train(net, optimizer, 9)))
    (whole, reports), (released, its_reports) = runs
    assert_same(whole, released)
    assert reports == its_reports and (reports or options == OPTIONS["plain AdamW"])


def test_bits_of_the_triton_backend():
    runs = []
    for released in (False, True):
        net = Net()
        optimizer = optimizer_of(
            net, backend="triton", normalization="zscore", layer_key=halves, mask_interval=1
        )
        if released:
            enable_gradient_release(net, optimizer)
        runs.append((optimizer, train(net, optimizer, range(1, 2))))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_several_groups_with_a_scheduler_and_corrected_weights():
    runs = []
    for released in (False, True):
        net = Net(torch.bfloat16)
        named = list(net.named_parameters())
        groups = [
            {"params": named[:3], "lr": 1e-2},
            {"params": named[3:5], "isolate": False, "betas": (0.8, 0.9)},
            {"params": named[5:], "weight_decay": 0.0},
        ]
        optimizer = MaskedEMAAdamW(groups, mask_interval=2, isolation_ratio=0.2, master_weight_bits=32)
        # a warm-up from lr 0, which is no template's
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)
        if released:
            enable_gradient_release(net, optimizer)
        train(net, optimizer, 7, after=lambda _, scheduler=scheduler: scheduler.step())
        runs.append(optimizer)
    assert_same(*runs)


# ---------------------------------------------------------------- memory and time


@pytest.mark.parametrize("released", [False, True])
def test_one_gradient_is_alive_at_a_time(released):
    net = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(10)))
    alive, peak = [], []

    def note(param):
        alive.append(weakref.ref(param.grad))
        peak.append(sum(ref() is not None for ref in alive))

    for param in net.parameters():  # before the release's own hooks
        param.register_post_accumulate_grad_hook(note)
    optimizer = optimizer_of(net)
    if released:
        enable_gradient_release(net, optimizer)
    for _ in range(3):
        net(torch.ones(3, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert max(peak) <= 2 if released else max(peak) == 20
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_plans_are_kept_from_step_to_step(monkeypatch):
    made = []

    class Counted(stepping.StepPlan):
        def __init__(self, entries, *arguments, **options):
            made.append([entry.name for entry in entries])
            super().__init__(entries, *arguments, **options)

    monkeypatch.setattr(stepping, "StepPlan", Counted)
    net = Net()
    optimizer = optimizer_of(net)
    enable_gradient_release(net, optimizer)
    train(net, optimizer, range(9))
    assert sorted(made) == sorted([name] for name, p in net.named_parameters() if p.numel())
    made.clear()
    optimizer.load_state_dict(optimizer.state_dict())  # other tensors: plans and the old state go
    train(net, optimizer, range(9, 12))
    assert len(made) == 8


def test_an_optimizer_that_goes_takes_its_hooks_along():
    net = Net()
    optimizer = optimizer_of(net)
    enable_gradient_release(net, optimizer)
    train(net, optimizer, 1)
    states = [weakref.ref(state["exp_avg_sq"]) for state in optimizer.state.values()]
    del optimizer
    gc.collect()
    assert not any(ref() is not None for ref in states)
    loss_of(net, 0).backward()
    assert net.scale.grad is not None
    enable_gradient_release(net, optimizer_of(net))


# ---------------------------------------------------------------- several ranks


def fsdp2_run(rank: int, released: bool, backwards: int, normalization: str):
    from torch.distributed.fsdp import fully_shard

    net = Net(scale_shape=(1,))  # which FSDP2 asks for
    for layer in (net.first, net.branch, net):
        fully_shard(layer)
    optimizer = optimizer_of(net, normalization=normalization)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step + 1.0)
    if released:
        enable_gradient_release(net, optimizer, accumulation_steps=backwards)
    alive = []
    for step in range(5):
        for i in range(backwards):
            loss_of(net, 300 * rank + 30 * i + step).backward()
        alive.append(sum(p.grad is not None for p in net.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        if backwards > 1 and step == 2:  # a batch that is thrown away
            loss_of(net, 50).backward()
            net.zero_grad(set_to_none=False)
    state = optimizer.state_dict()["state"]
    whole = {
        (number, key): value.full_tensor() if hasattr(value, "full_tensor") else value
        for number, one in state.items()
        for key, value in one.items()
    }
    weights = [p.detach().full_tensor() for p in net.parameters()]
    return weights, whole, optimizer.isolation_report().as_dict(), max(alive)


@pytest.mark.parametrize(("backwards", "normalization"), [(1, "minmax"), (2, "zscore")])
def test_fsdp2(backwards, normalization):
    from python_tests.ranks import on_ranks

    both_runs = [on_ranks(2, fsdp2_run, released, backwards, normalization) for released in (False, True)]
    for whole, released in zip(*both_runs, strict=True):
        assert all(map(torch.equal, whole[0], released[0]))
        assert whole[1].keys() == released[1].keys()
        assert all(torch.equal(value, released[1][key]) for key, value in whole[1].items())
        assert whole[2] == released[2] and whole[2]["isolated"] > 0
        assert whole[3] >= 7 and released[3] == 0
