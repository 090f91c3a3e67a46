"""Isolated rows without state on several ranks: pipeline stages select together; what is sharded is refused by name."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import fully_shard

from epi_kernels import MaskedEMAAdamW
from epi_kernels.optim.compact import RUNS_KEY
from python_tests.harness import give_gradients
from python_tests.ranks import on_ranks
from python_tests.row_runs import SHAPES, fresh, masks, model
from python_tests.sharded_net import Net, steps

STAGES = [("w", "bias"), ("tail", "gone", "bias")]  # tied: both hold the bias


def trained(names: tuple[str, ...], together: bool) -> tuple[dict[str, torch.Tensor], int, float]:
    """Weights, what the last refresh isolated, and its threshold."""
    params = model()
    held = {name: params[name] for name in names}
    optimizer = fresh(held)
    if together:
        optimizer.set_process_group(torch.distributed.group.WORLD)
    for name in held.keys() & masks().keys():
        optimizer.set_isolation_mask(held[name], masks()[name], persistent=True)
        assert RUNS_KEY in optimizer.state[held[name]]
    for number in range(5):
        give_gradients(params, number)
        optimizer.step()
    report = optimizer.isolation_report()
    return {name: param.detach() for name, param in held.items()}, report.isolated, report.threshold


def stage(rank: int):
    return trained(STAGES[rank], together=True)


def test_stages_of_a_pipeline_select_as_one_process():
    weights, isolated, threshold = trained(tuple(SHAPES), together=False)
    for found, isolated_there, threshold_there in on_ranks(2, stage):
        assert (isolated_there, threshold_there) == (isolated, threshold)
        for name, weight in found.items():
            assert torch.equal(weight, weights[name]), name


def sharded(rank: int) -> list[str]:
    """What is heard of a persistent mask; a run goes on without."""
    net, heard = Net(torch.float32), []
    fully_shard(net)
    optimizer = MaskedEMAAdamW(
        net.named_parameters(), isolation_ratio=0.1, mask_interval=2, isolation_granularity="row"
    )
    mask = torch.zeros(net.a.shape, dtype=torch.bool)
    mask[:40] = True
    steps(net, optimizer, 0, 3)
    before = {key: id(value) for key, value in optimizer.state[net.a].items()}
    try:
        optimizer.set_isolation_mask(net.a, mask, persistent=True)
    except NotImplementedError as error:
        heard.append(str(error))
    assert {key: id(value) for key, value in optimizer.state[net.a].items()} == before
    optimizer.set_isolation_mask(net.a, mask)
    steps(net, optimizer, 3, 5)
    return heard


def test_sharded_parameters_are_refused_by_name():
    for heard in on_ranks(2, sharded):
        assert len(heard) == 1 and heard[0].startswith("a: a DTensor") and "'element'" in heard[0]
