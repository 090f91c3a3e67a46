"""DeepSpeed itself: every stage of ZeRO is refused before a weight moves, without it (stage 0) masks work.

What DeepSpeed leaves of an optimizer's groups is played in test_sharded_training.py, where it is not installed.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

with pytest.MonkeyPatch.context() as patched:
    patched.setenv("DS_ACCELERATOR", "cpu")  # what it looks for at its import
    deepspeed = pytest.importorskip("deepspeed")

from epi_kernels import MaskedEMAAdamW
from python_tests.ranks import on_ranks

REFRESHES = {"isolation_ratio": 0.1, "mask_interval": 2}


def made(n_layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(n_layers)))


def config(stage: int, **more) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **more,
    }


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(2, 16, generator=torch.Generator().manual_seed(10 * step + rank))


def weights_of(net) -> list[torch.Tensor]:
    return [param.detach().clone() for param in net.parameters()]


def refused(rank: int, stage: int, n_layers: int, groups: int, more: dict) -> tuple[str, str, bool]:
    """(the error's name, its words, whether the weights are as before)"""
    net = made(n_layers)
    named = list(net.named_parameters())
    pairs = [{"params": [pair]} for pair in named] if groups > 1 else named
    optimizer = MaskedEMAAdamW(pairs, lr=1e-2, **REFRESHES)
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=optimizer, config=config(stage, **more), dist_init_required=False
    )
    before = weights_of(engine)
    dtype = before[0].dtype
    try:
        for step in range(4):
            engine.backward(engine(batch(step, rank).to(dtype)).float().pow(2).mean())
            engine.step()
    except (RuntimeError, NotImplementedError) as error:
        same = all(map(torch.equal, weights_of(engine), before)) and not optimizer.state
        return type(error).__name__, str(error), same
    return "", "", False


def each_refused(rank: int) -> dict:
    bfloat16 = {"bf16": {"enabled": True}}
    kinds = {
        "a group": (2, 1, {}),
        "a group each": (2, 2, {}),
        "one parameter": (1, 1, {}),  # the flat buffers are as many as the parameters
        "bfloat16": (2, 1, bfloat16),
        "bfloat16, gradients added in float32": (
            2,
            1,
            bfloat16 | {"data_types": {"grad_accum_dtype": "fp32"}},
        ),
    }
    return {
        (stage, kind): refused(rank, stage, *given) for stage in (1, 2, 3) for kind, given in kinds.items()
    }


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_every_stage_of_zero_is_refused_and_no_weight_has_moved(n_ranks):
    for found in on_ranks(n_ranks, each_refused):
        assert len(found) == 15
        for case, (kind, says, same) in found.items():
            assert kind == "RuntimeError" and "DeepSpeed's ZeRO" in says and "fully_shard" in says, (
                case,
                says,
            )
            assert same, case


def partitioned(rank: int) -> str:
    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        net = made(2)
    try:
        MaskedEMAAdamW(net.named_parameters())
    except NotImplementedError as error:
        return str(error)
    return ""


def test_parameters_made_under_zero_init_are_refused_at_once():
    for says in on_ranks(2, partitioned):
        assert "DeepSpeed ZeRO-3" in says and "fully_shard" in says


def without_zero(rank: int, n_ranks: int) -> tuple[bool, list[torch.Tensor], int]:
    """(whether the plain loop over the mean gradient has the same bits, masks, isolated)"""
    net, twin = made(2), made(2)
    ours, plain = (
        MaskedEMAAdamW(one.named_parameters(), lr=1e-2, weight_decay=0.1, **REFRESHES) for one in (net, twin)
    )
    engine, *_ = deepspeed.initialize(model=net, optimizer=ours, config=config(0), dist_init_required=False)
    for step in range(5):
        engine.backward(engine(batch(step, rank)).pow(2).mean())
        engine.step()
        grads = []
        for other in range(n_ranks):
            twin.zero_grad()
            twin(batch(step, other)).pow(2).mean().backward()
            grads.append([param.grad for param in twin.parameters()])
        for param, *every in zip(twin.parameters(), *grads, strict=True):
            param.grad = torch.stack(every).sum(0) / n_ranks
        plain.step()
    same = all(map(torch.equal, net.parameters(), twin.parameters()))
    report = ours.isolation_report()
    return same, [ours.isolation_mask(param) for param in net.parameters()], report.isolated


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_without_zero_the_bits_are_those_of_a_plain_loop(n_ranks):
    found = on_ranks(n_ranks, without_zero, n_ranks)
    for same, masks, isolated in found:
        assert same and isolated == int(0.1 * 512)
        assert sum(int(mask.sum()) for mask in masks) == isolated
