"""What one rank alone refuses on the way to a refresh is heard on all of them, and nobody waits."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from epi_kernels import MaskedEMAAdamW
from python_tests.ranks import on_ranks
from python_tests.sharded_net import Net, contents, differing, steps


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
