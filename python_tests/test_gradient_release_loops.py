"""Gradient release in loops of other shapes: the bits of a step over all gradients at once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from epi_kernels import MaskedEMAAdamW, enable_gradient_release
from python_tests.released_net import Net, assert_same, both, loss_of, optimizer_of, train


def test_accumulation():
    """The branch takes part in some of the backwards of a step, or in none."""

    def body(net, optimizer, released):
        if released:
            enable_gradient_release(net, optimizer, accumulation_steps=3)
        train(net, optimizer, 6, backwards=3)
        loss_of(net, 77).backward()  # an epoch ends with fewer
        optimizer.step()

    both(body)


@pytest.mark.parametrize("drop", ["to none", "to zero", "of the model"])
def test_accumulation_starts_anew_where_gradients_are_dropped(drop):
    def body(net, optimizer, released):
        if released:
            enable_gradient_release(net, optimizer, accumulation_steps=2)
        train(net, optimizer, 3, backwards=2)
        loss_of(net, 50).backward()  # a batch that is thrown away
        if drop == "of the model":
            net.zero_grad(set_to_none=False)
        else:
            optimizer.zero_grad(set_to_none=drop == "to none")
        loss_of(net, 51).backward()
        if released:
            assert not optimizer._release.is_open
        loss_of(net, 54).backward()
        if released:
            assert optimizer._release.is_open and net.scale.grad is None
        optimizer.step()

    both(body)


def test_closure():
    def body(net, optimizer, released):
        if released:
            enable_gradient_release(net, optimizer)
        for step in range(5):

            def closure(step=step):
                optimizer.zero_grad()
                loss = loss_of(net, step)
                loss.backward()
                return loss

            assert optimizer.step(closure) > 0

    both(body)


def test_frozen_and_unfrozen_parameters():
    def body(net, optimizer, released):
        net.first.requires_grad_(False)
        if released:
            enable_gradient_release(net, optimizer)
            assert not net.first.weight.requires_grad
        train(net, optimizer, 2)
        assert not optimizer.state.get(net.first.weight)
        net.first.requires_grad_(True)
        net.norm.requires_grad_(False)
        loss_of(net, 2).backward()
        assert (net.first.weight.grad is None) == released
        optimizer.step()
        optimizer.zero_grad()
        train(net, optimizer, range(3, 6))

    both(body)


def test_parameters_that_join_late_and_gradients_put_by_hand():
    def body(net, optimizer, released):
        if released:
            enable_gradient_release(net, optimizer)
        train(net, optimizer, 3)
        late = torch.nn.Parameter(torch.linspace(-1, 1, 70))
        net.register_parameter("late", late)
        optimizer.add_param_group({"params": [("late", late)], "lr": 0.1})
        for step in range(3, 7):
            (loss_of(net, step) + late.square().sum()).backward()
            net.nothing.grad = torch.empty(0)
            # it joined after the last step: not hooked yet, and stepped all the same
            assert (late.grad is None) == (released and step > 3)
            optimizer.step()
            optimizer.zero_grad()

    both(body)


def test_steps_without_a_backward_count():
    def body(net, optimizer, released):
        if released:
            enable_gradient_release(net, optimizer)
        train(net, optimizer, 3)
        optimizer.step()
        for p in net.parameters():
            p.grad = torch.ones_like(p)  # all by hand
        optimizer.step()
        assert optimizer.param_groups[0]["isolation_step"] == 5

    both(body)


def test_masks_of_the_user_act():
    def body(net, optimizer, released):
        if released:
            enable_gradient_release(net, optimizer)
        train(net, optimizer, 1)
        before = net.first.weight.detach().clone()
        mask = torch.zeros(72, 72, dtype=torch.bool)
        mask[3] = True
        optimizer.set_isolation_mask(net.first.weight, mask, persistent=True)
        train(net, optimizer, range(1, 8))
        assert torch.equal(net.first.weight[3], before[3]) and not torch.equal(net.first.weight[4], before[4])

    both(body)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    class Checkpointed(Net):
        def forward(self, tokens, *, branch: bool):
            x = checkpoint(self.first, self.embed(tokens), use_reentrant=reentrant).tanh()
            x = checkpoint(self.branch, x, use_reentrant=reentrant)
            return self.norm(x * self.scale) @ self.embed.weight.t()

    runs = []
    for released in (False, True):
        net = Checkpointed()
        optimizer = optimizer_of(net)
        if released:
            enable_gradient_release(net, optimizer)
        train(net, optimizer, 5)
        runs.append(optimizer)
    assert_same(*runs)


def test_two_optimizers():
    runs = []
    for released in (False, True):
        net = Net()
        named = list(net.named_parameters())
        optimizers = [MaskedEMAAdamW(part, mask_interval=2, lr=1e-2) for part in (named[::2], named[1::2])]
        if released:
            for optimizer in optimizers:
                enable_gradient_release(net, optimizer)
        for step in range(5):
            loss_of(net, step).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        runs.append(optimizers)
    for one, other in zip(*runs, strict=True):
        assert_same(one, other)


def test_remove():
    def body(net, optimizer, released):
        handle = enable_gradient_release(net, optimizer) if released else None
        train(net, optimizer, 3)
        if handle is not None:
            handle.remove()
            handle.remove()  # once more is nothing
        loss_of(net, 3).backward()
        assert net.scale.grad is not None
        optimizer.step()
        optimizer.zero_grad()
        if released:
            enable_gradient_release(net, optimizer)
        train(net, optimizer, range(4, 6))

    both(body)


def test_copies_and_checkpoints_do_not_release(tmp_path):
    def body(net, optimizer, released):
        if released:
            enable_gradient_release(net, optimizer)
        train(net, optimizer, 3)
        twin, its_optimizer = copy.deepcopy((net, optimizer))
        loss_of(twin, 3).backward()
        assert twin.scale.grad is not None and its_optimizer._release is None
        torch.save((net, optimizer.state_dict()), tmp_path / "both")
        loaded, state = torch.load(tmp_path / "both", weights_only=False)
        loss_of(loaded, 3).backward()
        assert loaded.scale.grad is not None
        optimizer.load_state_dict(state)
        train(net, optimizer, range(3, 6))

    both(body)


def test_a_template_for_a_checkpoint_takes_no_step():
    """torch.distributed.checkpoint steps a fresh optimizer with lr 0 on zero gradients."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    net = Net()
    optimizer = optimizer_of(net)
    enable_gradient_release(net, optimizer)
    assert get_optimizer_state_dict(net, optimizer)["state"]
    assert optimizer.param_groups[0]["isolation_step"] == 0
    assert {state["step"].item() for state in optimizer.state.values()} == {0}
    train(net, optimizer, 3)
    other = Net()
    whole = optimizer_of(other)
    get_optimizer_state_dict(other, whole)
    train(other, whole, 3)
    assert_same(whole, optimizer)


def test_a_compiled_model():
    runs = []
    for released in (False, True):
        net = Net()
        optimizer = optimizer_of(net)
        if released:
            enable_gradient_release(net, optimizer)
        train(torch.compile(net, backend="aot_eager"), optimizer, 4)
        runs.append(optimizer)
    assert_same(*runs)
