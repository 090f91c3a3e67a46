"""What gradient release refuses, by name and before anything changes, and what it makes of a backward that was broken off."""

from __future__ import annotations

import copy

import pytest
import torch

from epi_kernels import enable_gradient_release
from python_tests.harness import snapshot
from python_tests.released_net import Net, assert_same, both, loss_of, optimizer_of, train

# ---------------------------------------------------------------- broken off


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("out of memory")


def break_off(net) -> None:
    """The head, the norm and the scale have had their gradients by then."""
    tokens = torch.arange(5)
    x = Breaks.apply(net.first(net.embed(tokens)))
    with pytest.raises(RuntimeError, match="out of memory"):
        (net.norm(x * net.scale) @ net.embed.weight.detach().t()).sum().backward()


def test_a_step_after_a_broken_backward_is_torchs():
    """Parameters that have their gradients are stepped, others are not."""

    def body(net, optimizer, released):
        if released:
            enable_gradient_release(net, optimizer)
        train(net, optimizer, 3)
        break_off(net)
        optimizer.step()
        assert {int(optimizer.state[p]["step"]) for p in (net.norm.weight, net.first.weight)} == {3, 4}
        optimizer.zero_grad()
        train(net, optimizer, range(4, 7))

    both(body)


def test_a_backward_after_a_broken_one_is_refused():
    net = Net()
    optimizer = optimizer_of(net)
    enable_gradient_release(net, optimizer)
    train(net, optimizer, 3)
    state, weights = copy.deepcopy((optimizer.state_dict(), net.state_dict()))
    break_off(net)
    optimizer.zero_grad()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"norm\.\w+ has a second gradient.*broken off"):
        loss_of(net, 3).backward()
    with pytest.raises(RuntimeError, match=r"has a second gradient"):
        optimizer.step()
    optimizer.zero_grad()
    assert snapshot(optimizer) == before
    # back to a checkpoint
    net.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(net, optimizer, range(3, 6))
    whole = Net()
    its_optimizer = optimizer_of(whole)
    train(whole, its_optimizer, 6)
    assert_same(its_optimizer, optimizer)


def test_two_backwards_of_one_step_are_refused_at_the_second():
    net = Net()
    optimizer = optimizer_of(net)
    enable_gradient_release(net, optimizer)
    loss_of(net, 0).backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="accumulation_steps=n"):
        loss_of(net, 1).backward()
    optimizer.zero_grad()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(
    "call",
    [
        lambda net, optimizer, handle: optimizer.state_dict(),
        lambda net, optimizer, handle: optimizer.refresh_isolation_mask(),
        lambda net, optimizer, handle: optimizer.carry_importance(optimizer_of(net)),
        lambda net, optimizer, handle: optimizer.set_isolation_mask(net.scale, torch.tensor(True)),
        lambda net, optimizer, handle: copy.deepcopy(optimizer),
        lambda net, optimizer, handle: handle.remove(),
    ],
)
def test_nothing_else_between_backward_and_step(call):
    net = Net()
    optimizer = optimizer_of(net)
    handle = enable_gradient_release(net, optimizer)
    train(net, optimizer, 1)
    loss_of(net, 1).backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"in the middle of a step.*call optimizer.step\(\) first"):
        call(net, optimizer, handle)
    assert snapshot(optimizer) == before
    optimizer.step()


# ---------------------------------------------------------------- refused by name


def refused_in_backward(net, optimizer, match, backward, error=RuntimeError) -> None:
    """And nothing has changed."""
    before = snapshot(optimizer)
    with pytest.raises(error, match=match):
        backward()
    net.zero_grad()
    assert snapshot(optimizer) == before


def test_a_gradscaler_is_refused():
    net = Net()
    optimizer = optimizer_of(net)
    enable_gradient_release(net, optimizer)
    scalers = [torch.amp.GradScaler("cpu")]
    refused_in_backward(net, optimizer, "GradScaler", lambda: scalers[0].scale(loss_of(net, 0)).backward())
    scalers.clear()
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.scale(loss_of(net, 0)).backward()
    off.step(optimizer)
    loss_of(net, 1).backward()
    before = snapshot(optimizer)
    late = torch.amp.GradScaler("cpu")  # comes when weights are changed already: the step ends nothing
    optimizer.found_inf = torch.zeros(())
    with pytest.raises(RuntimeError, match=r"GradScaler.*were already stepped with scaled"):
        optimizer.step()
    del optimizer.found_inf, late
    assert snapshot(optimizer) == before
    optimizer.step()


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # create_graph=True
def test_what_a_step_refuses_is_refused_before_the_first_parameter():
    interval = lambda step: 0 if step == 4 else 2  # noqa: E731
    net = Net()
    optimizer = optimizer_of(net, mask_interval=interval)
    enable_gradient_release(net, optimizer)
    train(net, optimizer, 3)
    refused_in_backward(net, optimizer, "mask_interval", lambda: loss_of(net, 3).backward(), ValueError)

    optimizer = optimizer_of(net)
    enable_gradient_release(net, optimizer)
    train(net, optimizer, 1)
    optimizer.param_groups[0]["lr"] = -1.0
    refused_in_backward(net, optimizer, "lr must be", lambda: loss_of(net, 1).backward(), ValueError)
    optimizer.param_groups[0]["lr"] = 1.0
    refused_in_backward(
        net, optimizer, "create_graph=True", lambda: loss_of(net, 1).backward(create_graph=True)
    )
    optimizer.state[net.first.weight]["exp_avg"] = torch.zeros(
        3
    )  # a refresh follows, which looks at all state
    refused_in_backward(net, optimizer, "does not fit", lambda: loss_of(net, 1).backward())


def test_what_cannot_be_enabled():
    net = Net()
    optimizer = optimizer_of(net)
    with pytest.raises(TypeError, match="got AdamW"):
        enable_gradient_release(net, torch.optim.AdamW(net.parameters()))
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"accumulation_steps must be an int >= 1"):
            enable_gradient_release(net, optimizer, accumulation_steps=wrong)
    with pytest.raises(ValueError, match=r"scale, .*which the model has not"):
        enable_gradient_release(net.first, optimizer)
    handle = enable_gradient_release(net, optimizer)
    with pytest.raises(RuntimeError, match="already"):
        enable_gradient_release(net, optimizer)
    with pytest.raises(RuntimeError, match="another optimizer"):
        enable_gradient_release(net, optimizer_of(net))
    handle.remove()
    with pytest.raises(RuntimeError, match="capturable=True: a graph replays"):
        enable_gradient_release(net, optimizer_of(net, backend="triton", capturable=True))
    net.embed.sparse = True
    with pytest.raises(RuntimeError, match="embed has sparse gradients"):
        enable_gradient_release(net, optimizer)
    assert optimizer._release is None
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


def ddp_on_one_rank(rank: int) -> None:
    from torch.nn.parallel import DistributedDataParallel

    net = Net()
    optimizer = optimizer_of(net)
    handle = enable_gradient_release(net, optimizer)
    model = DistributedDataParallel(net, find_unused_parameters=True)  # comes later
    refused_in_backward(net, optimizer, "DistributedDataParallel", lambda: loss_of(model, 0).backward())
    handle.remove()
    for inside in (model, net):
        with pytest.raises(RuntimeError, match="DistributedDataParallel averages"):
            enable_gradient_release(inside, optimizer_of(net))
    enable_gradient_release(other := Net(), optimizer_of(other))  # which it knows nothing of


def test_distributed_data_parallel_is_refused():
    from python_tests.ranks import on_ranks

    on_ranks(1, ddp_on_one_rank)
