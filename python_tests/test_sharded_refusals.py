"""What one rank alone refuses on the way to a refresh is heard on all of them, and nobody waits."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from epi_kernels import MaskedEMAAdamW
from python_tests.ranks import Failed, on_ranks, outcomes
from python_tests.sharded_net import Net, contents, differing, grad, held, part, steps


def refused_on_one(rank: int, what: str, by_hand: bool):
    """A refresh is due at T = 4, where rank 1 cannot: what is heard; T and what has changed; and T of a step after it."""
    wrong = [rank == 1 and what != "state"]

    def ratio(T: int) -> float:
        if T == 4 and wrong[0]:
            if what == "error":
                raise KeyError("no ratio")
            return 2.0
        return 0.1

    net = Net(torch.float32)
    fully_shard(net)
    optimizer = MaskedEMAAdamW(net.named_parameters(), lr=1e-2, isolation_ratio=ratio, mask_interval=2)
    steps(net, optimizer, 0, 3)
    if by_hand:
        optimizer.param_groups[0]["isolation_step"] = 4
    before = contents(net, optimizer)
    state = optimizer.state[net.a]
    kept = state["isolation_mask"]
    if rank == 1 and what == "state":
        state["isolation_mask"] = kept[:3]
    try:
        optimizer.refresh_isolation_mask() if by_hand else steps(net, optimizer, 3, 4)
    except Exception as error:
        heard = f"{type(error).__name__}: {error}"
    state["isolation_mask"], wrong[0] = kept, False
    changed, step = differing(contents(net, optimizer), before), optimizer.param_groups[0]["isolation_step"]
    steps(net, optimizer, 3, 4)
    return heard, changed, step, optimizer.param_groups[0]["isolation_step"]


@pytest.mark.parametrize("by_hand", [False, True], ids=["due", "by hand"])
@pytest.mark.parametrize(
    "what, says",
    {
        "ratio": ("ValueError", r"isolation_ratio(4) must be a number in [0, 1), got 2.0"),
        "error": ("KeyError", "no ratio"),
        "state": ("RuntimeError", "the state 'isolation_mask' of a is"),
    }.items(),
)
def test_what_one_rank_refuses_all_hear(what, says, by_hand):
    found = on_ranks(2, refused_on_one, what, by_hand, timeout=60)
    assert found[0][0].startswith("ValueError: rank 1: ") and says[1] in found[0][0]
    assert found[1][0].startswith(says[0]) and says[1] in found[1][0]
    for _, changed, step, after in found:
        assert changed == [] and step == (4 if by_hand else 3) and after == step + 1


def refused_gradient(rank: int, kind: str, at: int, ends: bool):
    """A refresh is due at T = 3, and rank 1's gradient of a is wrong at call ``at``: the call and what is heard there, what
    has changed, and T once the call was made again. Nothing but the optimizer's own messages passes between the ranks."""
    net = Net(torch.float32)
    fully_shard(net)
    optimizer = MaskedEMAAdamW(net.named_parameters(), lr=1e-2, isolation_ratio=0.1, mask_interval=3)
    grads = [
        {name: part(grad(name, param, step), param) for name, param in net.named_parameters()}
        for step in range(4)
    ]
    heard, changed = None, []
    for step, right in enumerate(grads):
        for name, param in net.named_parameters():
            param.grad = right[name].clone()
        if rank == 1 and step == at:
            piece = net.a.grad.to_local()
            if kind == "sparse":
                net.a.grad._local_tensor = piece.to_sparse()
            else:
                net.a.grad = torch.zeros(net.a.shape)
        before = held(net, optimizer)
        try:
            optimizer.step()
        except Exception as error:
            if ends:
                raise
            heard = step, f"{type(error).__name__}: {error}"
            changed = differing(held(net, optimizer), before)
            net.a.grad = right["a"].clone()
            optimizer.step()
    return heard, changed, optimizer.param_groups[0]["isolation_step"]


@pytest.mark.parametrize("at", [0, 2], ids=["the first step", "before a refresh"])
@pytest.mark.parametrize(
    "kind, says",
    [
        ("sparse", "the gradient of a is sparse"),
        ("plain", "a gradient is a Tensor beside a parameter that is"),
    ],
)
def test_a_gradient_that_one_rank_refuses_all_hear_of_where_they_meet(kind, says, at):
    """And the call may be made again: nothing has changed on any."""
    found = on_ranks(2, refused_gradient, kind, at, False, timeout=60)
    assert found[0][0] == (at, f"ValueError: rank 1: {found[1][0][1].removeprefix('RuntimeError: ')}")
    assert found[1][0][0] == at and found[1][0][1].startswith(f"RuntimeError: {says}")
    for _, changed, step in found:
        assert changed == [] and step == 4


def test_a_rank_that_ends_at_a_step_without_messages_is_missed_at_the_next_refresh():
    first, second = outcomes(2, refused_gradient, "sparse", 1, True, timeout=60)
    assert isinstance(second, Failed) and "the gradient of a is sparse" in second.message
    assert isinstance(first, Failed) and first.kind == "RuntimeError"
    assert first.message.startswith(
        "the ranks did not meet after 2 steps: one has ended, or has refused a step"
    )


def test_a_rank_that_refused_a_step_without_messages_may_make_it_again():
    found = on_ranks(2, refused_gradient, "sparse", 1, False, timeout=60)
    assert found[0] == (None, [], 4)
    assert found[1][0][0] == 1 and found[1][1:] == ([], 4)
