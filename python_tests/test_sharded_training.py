"""What else sharded optimizers meet: pipelines, changing groups, loss scales, masks by hand, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from epi_kernels import MaskedEMAAdamW
from python_tests.ranks import Failed, on_ranks, outcomes
from python_tests.sharded import REFRESHES, SHAPES, cut, gradient, weights, whole
from python_tests.test_sharding import alone


def stage_of_a_pipeline(rank: int, shared: bool):
    """Ranks 0 and 1 hold different plain parameters; ``shared``: rank 2 is a replica of rank 1."""
    names = list(SHAPES)[::2] if rank == 0 else list(SHAPES)[1::2]
    params = {name: nn.Parameter(one) for name, one in weights(torch.float32).items() if name in names}
    optimizer = MaskedEMAAdamW(params.items(), lr=1e-2, weight_decay=0.1, **REFRESHES)
    optimizer.set_process_group(torch.distributed.group.WORLD)
    for step in range(7):
        for name, param in params.items():
            param.grad = gradient(name, step, torch.float32)
        optimizer.step()
    masks = {name: optimizer.isolation_mask(param) for name, param in params.items()}
    return masks, optimizer.isolation_report().isolated


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_stages_of_a_pipeline_select_together_and_replicas_count_once(n_ranks):
    expected = alone("float32", "cpu")
    for masks, isolated in on_ranks(n_ranks, stage_of_a_pipeline, n_ranks == 3):
        assert isolated == expected["report"]["isolated"]
        for name, mask in masks.items():
            assert torch.equal(mask, expected[name, "mask"])


def fsdp1(rank: int, use_orig_params: bool):
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = FullyShardedDataParallel(
        nn.Linear(8, 8), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    MaskedEMAAdamW(net.named_parameters())


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused_and_the_message_points_to_fsdp2(use_orig_params, n_ranks):
    for heard in outcomes(n_ranks, fsdp1, use_orig_params):
        assert isinstance(heard, Failed) and heard.kind == "NotImplementedError"
        assert "FSDP1" in heard.message and "fully_shard" in heard.message


def zero_of_torch(rank: int):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = nn.Linear(8, 8)
    assert ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW).optim.param_groups
    MaskedEMAAdamW(net.named_parameters())  # beside it: nobody shares this one's parameters out
    ZeroRedundancyOptimizer(net.parameters(), MaskedEMAAdamW)


def test_torchs_zero_is_refused():
    for heard in outcomes(2, zero_of_torch):
        assert isinstance(heard, Failed) and heard.kind == "NotImplementedError"
        assert "ZeroRedundancyOptimizer" in heard.message and "fully_shard" in heard.message


def test_zero_3_is_refused():
    param = nn.Parameter(torch.ones(3))
    param.ds_id = 0  # what DeepSpeed marks a partitioned parameter with
    with pytest.raises(NotImplementedError, match="ZeRO-3.*fully_shard"):
        MaskedEMAAdamW([("w", param)])


@pytest.mark.parametrize("named", [True, False])
def test_groups_whose_parameters_became_a_flat_buffer_are_refused(named):
    """As DeepSpeed's ZeRO leaves them; test_deepspeed.py has the real one, where it is installed."""
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    optimizer = MaskedEMAAdamW([("a", weights[0]), ("b", weights[1])] if named else weights)
    flat = nn.Parameter(torch.cat([weight.detach().view(-1) for weight in weights]))
    flat.grad = torch.ones(7)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="made with 2 parameters .* now hold 1: DeepSpeed"):
        optimizer.step()
    assert torch.equal(flat, torch.ones(7)) and not optimizer.state


def test_a_flat_buffer_in_the_place_of_an_only_parameter_is_refused():
    """The number of parameters is right, and each rank would select alone in its part."""
    optimizer = MaskedEMAAdamW([("w", nn.Parameter(torch.ones(4, 2)))])
    flat = nn.Parameter(torch.ones(4))
    flat.grad = torch.ones(4)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"shape \[4, 2\] in whose place .* one of \[4\]: DeepSpeed"):
        optimizer.step()
    assert torch.equal(flat, torch.ones(4)) and not optimizer.state


def test_a_lazy_modules_parameters_get_their_shape_later():
    net = nn.LazyLinear(3)
    optimizer = MaskedEMAAdamW(net.named_parameters())
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert optimizer.state[net.weight]["exp_avg"].shape == (3, 4)


def mixed(rank: int):
    """A replicated plain parameter among sharded ones counts once."""
    mesh = init_device_mesh("cpu", (2,))
    params = {
        name: nn.Parameter(one if name == "bias" else cut(one, mesh, [Shard(0)]))
        for name, one in weights(torch.float32).items()
    }
    optimizer = MaskedEMAAdamW(params.items(), lr=1e-2, weight_decay=0.1, **REFRESHES)
    for step in range(7):
        for name, param in params.items():
            full = gradient(name, step, torch.float32)
            param.grad = full if name == "bias" else cut(full, mesh, [Shard(0)])
        optimizer.step()
    return {name: whole(optimizer.isolation_mask(param)) for name, param in params.items()}


def test_a_plain_parameter_among_sharded_ones_counts_once():
    expected = alone("float32", "cpu")
    for masks in on_ranks(2, mixed):
        assert all(torch.equal(mask, expected[name, "mask"]) for name, mask in masks.items())


def partial_gradient(rank: int):
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Replicate()]))
    optimizer = MaskedEMAAdamW([("w", param)], lr=0.1, weight_decay=0.0)
    param.grad = DTensor.from_local(torch.full((4,), float(rank + 1)), mesh, [Partial()])
    optimizer.step()
    return optimizer.state[param]["exp_avg"].to_local(), param.grad.placements == param.placements


def test_a_partial_gradient_is_summed_first():
    for exp_avg, redistributed in on_ranks(2, partial_gradient):
        assert torch.allclose(exp_avg, torch.full((4,), 0.3)) and redistributed


def collectives(rank: int):
    """Calls of all-reduce, by step."""
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(cut(torch.ones(8, 4), mesh, [Shard(0)]))
    optimizer = MaskedEMAAdamW([("w", param)], isolation_ratio=0.1, mask_interval=4)
    calls, counts, original = [], [], torch.distributed.all_reduce

    def counted(tensor, *arguments, **options):
        calls.append(tensor.nbytes)
        return original(tensor, *arguments, **options)

    torch.distributed.all_reduce = counted
    for _ in range(5):
        calls.clear()
        param.grad = cut(torch.arange(32.0).view(8, 4), mesh, [Shard(0)])
        optimizer.step()
        counts.append(list(calls))
    return counts


def test_an_ordinary_step_reduces_nothing_and_a_refresh_a_few_small_tensors():
    for counts in on_ranks(2, collectives):
        assert counts[0] == counts[1] == counts[2] == counts[4] == []
        opening, extrema, *passes, report = counts[3]
        assert (opening, extrema, report) == (40, 8, 32)  # one layer
        assert 1 <= len(passes) <= 4 and set(passes) == {2049 * 8}  # a counting pass each, 2,048 bins


def scaled(rank: int, overflows: bool):
    """Four steps under a GradScaler; in the second one rank's gradient overflows."""
    net = nn.Linear(4, 6)
    with torch.no_grad():
        net.weight.copy_(torch.arange(24.0).view(6, 4) / 24)
        net.bias.zero_()
    fully_shard(net)
    optimizer = MaskedEMAAdamW(net.named_parameters(), mask_interval=2, isolation_ratio=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    steps = []
    for step in range(4):
        scaler.scale(net(torch.arange(8.0).view(2, 4)).sum()).backward()
        if overflows and step == 1 and rank == 1:
            net.weight.grad.to_local()[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        steps.append(optimizer.param_groups[0]["isolation_step"])
    return steps, whole(net.weight.detach()), whole(optimizer.isolation_mask(net.weight))


@pytest.mark.parametrize("overflows", [False, True])
def test_an_overflow_on_one_rank_skips_the_step_on_all(overflows):
    one, other = on_ranks(2, scaled, overflows)
    assert one[0] == other[0] == ([1, 1, 2, 3] if overflows else [1, 2, 3, 4])
    assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2]) and one[2].any()


def groups_that_change(params, place):
    """A group is added after three steps, and a parameter leaves isolation after six."""
    names = list(params)
    optimizer = MaskedEMAAdamW(
        [{"params": [(name, params[name]) for name in names[:3]]}], lr=1e-2, **REFRESHES
    )
    for step in range(9):
        if step == 3:
            optimizer.add_param_group({"params": [(name, params[name]) for name in names[3:]], "lr": 2e-2})
        if step == 6:
            optimizer.param_groups[0]["isolate"] = False
        for name, param in params.items():
            param.grad = place(gradient(name, step, param.dtype))
        optimizer.step()
    found = {name: (whole(p.detach()), whole(optimizer.isolation_mask(p))) for name, p in params.items()}
    return found, optimizer.isolation_report().as_dict()


def sharded_groups_that_change(rank: int):
    mesh = init_device_mesh("cpu", (3,))

    def place(tensor):
        return cut(tensor, mesh, [Shard(0)])

    params = {name: nn.Parameter(place(one)) for name, one in weights(torch.float32).items()}
    return groups_that_change(params, place)


def test_groups_added_later_and_taken_out_of_isolation():
    params = {name: nn.Parameter(one) for name, one in weights(torch.float32).items()}
    expected, report = groups_that_change(params, lambda grad: grad)
    for found, its_report in on_ranks(3, sharded_groups_that_change):
        assert its_report == report
        for name, (weight, mask) in expected.items():
            assert torch.equal(found[name][0], weight) and torch.equal(found[name][1], mask), name


def masks_set_by_hand(rank: int):
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(cut(torch.ones(5, 3), mesh, [Shard(0)]))
    optimizer = MaskedEMAAdamW([("w", param)], lr=0.1, isolation_ratio=0.0)
    mask = torch.arange(15).view(5, 3) % 2 == 0
    optimizer.set_isolation_mask(param, mask)
    from_whole = whole(optimizer.isolation_mask(param))
    optimizer.set_isolation_mask(param, cut(~mask, mesh, [Shard(0)]), persistent=True)
    param.grad = cut(torch.ones(5, 3), mesh, [Shard(0)])
    optimizer.step()
    heard = []
    for wrong in (torch.ones(2, 3, dtype=torch.bool), cut(mask, mesh, [Replicate()]), mask.float()):
        try:
            optimizer.set_isolation_mask(param, wrong)
        except (ValueError, TypeError) as error:
            heard.append(str(error))
    return mask, from_whole, whole(optimizer.isolation_mask(param)), whole(param.detach()), heard


def test_masks_are_set_whole_or_as_shards_and_wrong_ones_are_refused_on_every_rank():
    for mask, from_whole, both, weight, heard in on_ranks(2, masks_set_by_hand):
        assert torch.equal(from_whole, mask) and both.all() and torch.equal(weight, torch.ones(5, 3))
        assert [word in text for word, text in zip(("shape", "placements", "bool"), heard)] == [True] * 3


def tensor_parallel(rank: int):
    """Tensor parallelism and FSDP2 as torch's own calls lay them out; rank None: one process."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16), nn.LayerNorm(16))
    if rank is not None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(net, mesh=mesh["dp"])
    optimizer = MaskedEMAAdamW(net.named_parameters(), lr=1e-2, isolation_ratio=0.1, mask_interval=2)
    for step in range(4):
        batch = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
        net(batch).pow(3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    masks = {name: whole(optimizer.isolation_mask(param)) for name, param in net.named_parameters()}
    return masks, optimizer.isolation_report().isolated


def test_tensor_parallelism_with_fsdp2_has_the_masks_of_one_process():
    expected, isolated = tensor_parallel(None)
    for masks, its_isolated in on_ranks(4, tensor_parallel):
        assert its_isolated == isolated > 0
        differing = sum(int((masks[name] != mask).sum()) for name, mask in expected.items())
        assert (
            differing == 0
        )  # the products are added up in another order, by which no score crosses the threshold here


def lr_0_after_agreement(rank: int):
    """Ranks that have refreshed together before the first step; then one of them warms up from 0."""
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(cut(torch.ones(8, 4), mesh, [Shard(0)]))
    optimizer = MaskedEMAAdamW([("w", param)], isolation_ratio=0.1)
    optimizer.refresh_isolation_mask()
    if rank == 1:
        optimizer.param_groups[0]["lr"] = 0.0
    param.grad = cut(torch.ones(8, 4), mesh, [Shard(0)])
    optimizer.step()


def test_ranks_compare_again_until_the_first_step_is_taken():
    for heard in outcomes(2, lr_0_after_agreement, timeout=60):
        assert isinstance(heard, Failed) and "ranks disagree on the lr of w" in heard.message
