"""When a refresh happens: warm-up and interval, steps without gradients, steps that a scaler skips."""

from __future__ import annotations

import math

import pytest
import torch

from epi_kernels.policies.schedule import may_be_due, refresh_due
from python_tests.harness import Target, make, small_model, train


@pytest.mark.parametrize(
    ("interval", "warmup", "due"),
    [
        (3, None, [3, 6, 9]),
        (3, 1, [1, 4, 7, 10]),
        (3, 5, [5, 8]),
        (3, 0, [3, 6, 9]),
        (1, None, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (1, 8, [8, 9, 10]),
        (20, 4, [4]),
        (20, None, []),
        (None, None, []),
        (None, 2, []),
    ],
)
def test_due_steps(interval, warmup, due):
    params = small_model()
    optimizer = make(params, mask_interval=interval, mask_warmup=warmup)
    seen, last = [], None
    for number in range(10):
        before = {name: p.detach().clone() for name, p in params.items()}
        isolated = {name: optimizer.isolation_mask(p) for name, p in params.items()}
        train(optimizer, params, range(number, number + 1))
        report = optimizer.isolation_report()
        if report is not last:
            seen.append(report.step)
            assert report.step == number + 1 == optimizer.param_groups[0]["isolation_step"]
        last = report
        # What a refresh selects acts from the next step on, and nothing is isolated before the first.
        for name, p in params.items():
            assert torch.equal(p == before[name], isolated[name]), name
    assert seen == due


def test_steps_without_any_gradient_count_and_may_be_followed_by_a_refresh():
    params = small_model()
    optimizer = make(params, mask_interval=4)
    train(optimizer, params, 2)
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert optimizer.isolation_report() is None
    optimizer.step()
    assert optimizer.isolation_report().step == 4
    assert all(state["step"].item() == 2 for state in optimizer.state.values())
    assert optimizer.isolation_report().isolated == math.floor(0.2 * 152)


def test_found_inf_skips_everything():
    params = small_model()
    optimizer = make(params, mask_interval=2)
    train(optimizer, params, 1)
    before = repr(optimizer.state_dict()), [p.detach().clone() for p in params.values()]
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(4.0)
    for _ in range(3):
        optimizer.step()
    assert repr(optimizer.state_dict()) == before[0]
    assert all(torch.equal(p, b) for p, b in zip(params.values(), before[1], strict=True))
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert optimizer.isolation_report().step == 2


def test_grad_scaler_hands_over_the_scale(target: Target):
    """torch.amp.GradScaler leaves unscaling to the step, and .grad holds the unscaled gradient afterwards."""
    runs = []
    for scaled in (True, False):
        params = small_model(device=target.device)
        optimizer = make(params, backend=target.backend)
        scaler = torch.amp.GradScaler(target.device, init_scale=1024.0, growth_interval=2, enabled=scaled)
        for number in range(4):
            optimizer.zero_grad()
            loss = sum((p * (number + 1 + i)).square().sum() for i, p in enumerate(params.values()))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append((optimizer, params))
    for (_, a), (_, b) in zip(runs[0][1].items(), runs[1][1].items(), strict=True):
        assert torch.equal(a, b) and torch.equal(a.grad, b.grad)


def test_grad_scaler_skips_overflow():
    params = small_model()
    optimizer = make(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(sum(p.square().sum() for p in params.values())).backward()
    params["block.bias"].grad[0] = math.inf
    before = [p.detach().clone() for p in params.values()]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(p, b) for p, b in zip(params.values(), before, strict=True))
    assert optimizer.param_groups[0]["isolation_step"] == 0


@pytest.mark.parametrize(
    ("first", "last", "due"), [(1, 9, False), (1, 10, True), (11, 19, False), (12, 20, True)]
)
def test_a_range_of_steps_may_be_due(first, last, due):
    assert may_be_due(first, last, interval=10, warmup=None) is due
    some = [refresh_due(step, interval=10, warmup=None) for step in range(first, last + 1)]
    assert any(some) is due
