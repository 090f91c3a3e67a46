"""Sharded parameters: masks, weights and states are those of one process, to the bit, however they are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from epi_kernels import AdaptiveInterval, AdaptiveRatio, MaskedEMAAdamW
from python_tests.ranks import Failed, on_ranks, outcomes

SHAPES = {
    "embedding": (37, 24),  # tied: the model has it twice, the optimizer once
    "block.0.weight": (24, 40),
    "block.0.norm": (24,),
    "block.1.weight": (65, 130),  # above 4,096 elements: 8-bit states are codes
    "block.1.norm": (7,),  # fewer rows than some meshes have ranks, once cut twice
    "experts": (5, 6, 9),
    "bias": (3,),
    "single": (1, 1),
}
REFRESHES = {"isolation_ratio": 0.07, "mask_interval": 3}
OPTIONS = {
    "float32": {},
    "float32, zscore": {"normalization": "zscore"},
    "float32, none, a threshold a layer, hysteresis": {
        "normalization": "none",
        "scope": "layer",
        "hysteresis": 0.3,
    },
    "float32, own importance, layers of blocks": {
        "importance_beta": 0.9,
        "layer_key": lambda name: name.rpartition(".")[0],
    },
    "float32, functions of T": {
        "mask_interval": lambda T: 2 if T < 3 else 3,
        "isolation_ratio": lambda T: 0.01 * (T + 1),
    },
    "float32, adaptive": {
        "mask_interval": AdaptiveInterval(2, maximum=3, low=0.05, high=0.1),
        "isolation_ratio": AdaptiveRatio(0.07, low=0.05, high=0.1),
    },
    "bfloat16": {},
    "bfloat16, 24 bits": {"master_weight_bits": 24},
    "bfloat16, 8-bit": {"state_dtype": "int8", "importance_beta": 0.9, "importance_dtype": "int8"},
}
# what each mesh does with a tensor of one, two and three dimensions
LAYOUTS = {
    "FSDP on 1": ((1,), lambda n: [Shard(0)]),
    "FSDP on 2": ((2,), lambda n: [Shard(0)]),
    "FSDP on 3": ((3,), lambda n: [Shard(0)]),
    "FSDP on 4": ((4,), lambda n: [Shard(0)]),
    "the last dimension on 3": ((3,), lambda n: [Shard(n - 1)]),
    "HSDP": ((2, 2), lambda n: [Replicate(), Shard(0)]),
    "columns and FSDP": ((2, 2), lambda n: [Shard(0), Shard(n - 1) if n > 1 else Replicate()]),
    "rows and FSDP": ((2, 2), lambda n: [_StridedShard(0, split_factor=2), Shard(0)]),
}


def gradient(name: str, step: int, dtype: torch.dtype) -> torch.Tensor:
    rng = np.random.default_rng([step, *name.encode()])
    scale = 10.0 ** rng.integers(-4, 0)
    return torch.from_numpy(rng.standard_normal(SHAPES[name]).astype(np.float32) * scale).to(dtype)


def weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(7)
    return {
        name: torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(dtype)
        for name, shape in SHAPES.items()
    }


def cut(tensor: torch.Tensor, mesh, placements) -> DTensor:
    """This rank's part of a tensor that every rank has; ``distribute_tensor`` does not know strided shards."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    part = tensor[tuple(slice(start, start + n) for start, n in zip(offset, shape))].clone()
    return DTensor.from_local(part, mesh, placements, shape=tensor.shape, stride=tensor.stride())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(params: dict[str, nn.Parameter], place, backend: str, options: dict, steps: int = 7) -> dict:
    """Everything that must be the same on any number of ranks, unsharded."""
    optimizer = MaskedEMAAdamW(
        params.items(), lr=1e-2, weight_decay=0.1, backend=backend, **(REFRESHES | options)
    )
    for step in range(steps):
        for name, param in params.items():
            param.grad = place(gradient(name, step, param.dtype))
        optimizer.step()
    found = {}
    for name, param in params.items():
        found[name, "weight"] = whole(param.detach())
        found[name, "mask"] = whole(optimizer.isolation_mask(param))
        for key, value in optimizer.state_dict()["state"][list(params).index(name)].items():
            if key not in ("isolation_mask", "persistent_mask"):
                found[name, key] = whole(value)
    report = optimizer.isolation_report()
    found["report"] = None if report is None else report.as_dict()
    return found


def options_of(case: str) -> tuple[torch.dtype, dict]:
    return getattr(torch, case.partition(",")[0]), OPTIONS[case]


def alone(case: str, backend: str) -> dict:
    dtype, options = options_of(case)
    return train(
        {name: nn.Parameter(one) for name, one in weights(dtype).items()}, lambda grad: grad, backend, options
    )


def sharded(rank: int, layout: str, case: str, backend: str, steps: int = 7) -> dict:
    shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", shape)
    dtype, options = options_of(case)

    def place(tensor):
        return cut(tensor, mesh, placements(tensor.ndim))

    params = {name: nn.Parameter(place(one)) for name, one in weights(dtype).items()}
    return train(params, place, backend, options, steps)


def differing(one: dict, other: dict) -> list:
    assert one.keys() == other.keys()
    return [
        key
        for key, value in one.items()
        if not (torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key])
    ]


# every layout with and without random numbers, every option on the layouts that ask most of it
PAIRS = [(layout, case) for layout in LAYOUTS for case in ("float32", "bfloat16")]
PAIRS += [
    (layout, case) for layout in ("FSDP on 3", "HSDP") for case in OPTIONS if "," in case and "8" not in case
]


@pytest.mark.parametrize("layout, case", PAIRS)
def test_a_sharded_run_has_the_bits_of_one_process(layout, case):
    expected = alone(case, "cpu")
    assert (
        0 < expected["report"]["isolated"] and expected["report"]["entered"] != expected["report"]["isolated"]
    )
    for found in on_ranks(int(np.prod(LAYOUTS[layout][0])), sharded, layout, case, "cpu"):
        assert differing(found, expected) == []


@pytest.mark.parametrize("layout", ["FSDP on 3", "the last dimension on 3", "columns and FSDP"])
def test_backends_agree_on_shards_with_8_bit_states(layout):
    """Blocks begin with the shard, random numbers go by places in the whole."""
    n_ranks = int(np.prod(LAYOUTS[layout][0]))
    both = [
        on_ranks(n_ranks, sharded, layout, "bfloat16, 8-bit", backend) for backend in ("cpu", "reference")
    ]
    for mine, theirs in zip(*both):
        assert differing(mine, theirs) == []


def test_triton_places_random_numbers_of_scattered_shards():
    layout = "the last dimension on 3"
    both = [on_ranks(3, sharded, layout, "bfloat16", backend, 2) for backend in ("triton", "reference")]
    for mine, theirs in zip(*both):
        assert differing(mine, theirs) == []


def whose_ratio_differs(rank: int) -> str:
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(cut(torch.ones(8), mesh, [Shard(0)]))
    optimizer = MaskedEMAAdamW(
        [("w", param)], backend="cpu", mask_interval=2, isolation_ratio=lambda T: 0.5 - rank * T / 8
    )
    for _ in range(2):
        param.grad = cut(torch.arange(8.0), mesh, [Shard(0)])
        try:
            optimizer.step()
        except ValueError as error:
            return f"{optimizer.param_groups[0]['isolation_step']}: {error}"
    return "went on"


def test_ranks_whose_functions_give_different_values_are_refused():
    for said in on_ranks(2, whose_ratio_differs):
        assert said.startswith("1: ranks disagree on isolation_ratio: 0.5 on rank 0, 0.25 on rank 1")


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


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused_and_the_message_points_to_fsdp2(use_orig_params):
    for heard in outcomes(2, fsdp1, use_orig_params):
        assert isinstance(heard, Failed) and heard.kind == "NotImplementedError"
        assert "FSDP1" in heard.message and "fully_shard" in heard.message


def test_zero_3_is_refused():
    param = nn.Parameter(torch.ones(3))
    param.ds_id = 0  # what DeepSpeed marks a partitioned parameter with
    with pytest.raises(NotImplementedError, match="ZeRO-3.*fully_shard"):
        MaskedEMAAdamW([("w", param)])


@pytest.mark.parametrize("named", [True, False])
def test_groups_whose_parameters_became_a_flat_buffer_are_refused(named):
    """As DeepSpeed's ZeRO-1 and ZeRO-2 leave them, tried with DeepSpeed 0.19."""
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    optimizer = MaskedEMAAdamW([("a", weights[0]), ("b", weights[1])] if named else weights)
    flat = nn.Parameter(torch.cat([weight.detach().view(-1) for weight in weights]))
    flat.grad = torch.ones(7)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="made with 2 parameters .* now hold 1: DeepSpeed"):
        optimizer.step()
    assert torch.equal(flat, torch.ones(7)) and not optimizer.state


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
