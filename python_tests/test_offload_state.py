"""State that lies in host memory goes out, comes in and is carried on as any other; and what cannot be offloaded is said."""

from __future__ import annotations

import copy
import io
import time
import weakref

import pytest
import torch

from epi_kernels import MaskedEMAAdamW, enable_gradient_release
from epi_kernels.integrations import checkpoints
from epi_kernels.integrations.checkpoints import load_checkpoint, save_checkpoint
from epi_kernels.isolation import isolate_rows
from epi_kernels.optim import state
from epi_kernels.optim.exchange import load_isolation, save_isolation
from epi_kernels.optim.offload import pipeline
from python_tests.harness import assert_same_run, give_gradients, make, snapshot
from python_tests.released_net import Net, assert_same, loss_of, optimizer_of, train
from python_tests.simulated_device import OnDevice, pinned, plain, simulated  # noqa: F401

pytestmark = pytest.mark.usefixtures("simulated")

INT8 = {"state_dtype": "int8", "importance_beta": 0.9, "importance_dtype": "int8"}
EXACT = {"master_weight_bits": 32}


def started(offload, steps=4, **options):
    net = Net(torch.bfloat16)
    optimizer = optimizer_of(net, offload=offload, **options)
    if steps:
        train(net, optimizer, steps)
    return net, optimizer


def through_a_file(optimizer: MaskedEMAAdamW) -> dict:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("options", [INT8, EXACT], ids=["8-bit", "exact weights"])
@pytest.mark.parametrize(("before", "after"), [("cpu", "cpu"), ("cpu", None), (None, "cpu")])
def test_a_run_goes_on_offloaded_or_not(before, after, options):
    net, optimizer = started(before, **options)
    again, fresh = started(after, 0, **options)
    fresh.load_state_dict(through_a_file(optimizer))
    again.load_state_dict(net.state_dict())
    enable_gradient_release(again, fresh)
    train(again, fresh, range(4, 9))
    undisturbed = started(None, 9, **options)[1]
    assert_same(fresh, undisturbed)


@pytest.mark.parametrize(("before", "after"), [("cpu", None), (None, "cpu")])
def test_checkpoints(tmp_path, before, after):
    net, optimizer = started(before, **INT8)
    save_checkpoint(tmp_path / "last", net, optimizer)
    again, fresh = started(after, 0, **INT8)
    load_checkpoint(tmp_path / "last", again, fresh)
    train(again, fresh, range(4, 7))
    assert_same(fresh, started(None, 7, **INT8)[1])


def test_a_load_lets_go_of_what_it_has_read(tmp_path, monkeypatch):
    """States of 8 billion parameters are not to be held twice, nor their weights on the device."""
    net, optimizer = started("cpu", **INT8)
    save_checkpoint(tmp_path / "last", net, optimizer)
    again, fresh = started("cpu", 0, **INT8)
    load, read = checkpoints.load, state.load_param_state
    loaded, alive = [], []

    def loading(template, **options):
        load(template, **options)
        states = template[checkpoints.OPTIMIZER][checkpoints.STATE].values()
        loaded.extend(weakref.ref(value) for one in states for value in one.values())

    def reading(*arguments):
        alive.append(sum(one() is not None for one in loaded))
        return read(*arguments)

    monkeypatch.setattr(checkpoints, "load", loading)
    monkeypatch.setattr(state, "load_param_state", reading)
    load_checkpoint(tmp_path / "last", again, fresh)
    of_each = [len(one) for one in fresh.state.values()]
    assert alive == [sum(of_each[number:]) for number in range(len(of_each))]
    assert_same(fresh, optimizer)
    room = checkpoints._room_for({"weight": torch.empty(3, 4, dtype=torch.bfloat16, device="meta")})["weight"]
    assert (room.device.type, room.dtype, room.shape) == ("cpu", torch.bfloat16, (3, 4))


def test_a_template_for_a_distributed_load_moves_nothing():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    net = torch.nn.Linear(80, 60)
    again = copy.deepcopy(net)
    optimizer, fresh = (optimizer_of(one, offload="cpu", **INT8) for one in (net, again))
    for _ in range(3):
        net(torch.ones(2, 80)).sum().backward()
        optimizer.step()
    saved = get_optimizer_state_dict(net, optimizer)
    before = [param.detach().clone() for param in again.parameters()]
    template = get_optimizer_state_dict(again, fresh)
    assert all(map(torch.equal, before, again.parameters())) and fresh._isolation_step == 0
    assert saved["state"]["weight"].keys() == template["state"]["weight"].keys() >= {"exp_avg_scale"}
    set_optimizer_state_dict(again, fresh, saved)
    for one, other in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_masks_importance_and_copies_of_an_optimizer(tmp_path):
    """By hand: masks installed, persistent ones, a refresh, a new stage, a file, a copy."""
    runs = []
    for offload in (None, "cpu"):
        net, optimizer = started(offload, isolation_ratio=0.0, importance_beta=0.9, **EXACT)
        weight = net.first.weight
        mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3
        optimizer.set_isolation_mask(weight, mask, persistent=True)
        optimizer.set_isolation_mask(net.embed.weight, torch.ones(19, 72, dtype=torch.bool))
        held = weight.detach().clone()
        train(net, optimizer, range(4, 6))
        assert torch.equal(weight[mask], held[mask]) and not torch.equal(weight, held)
        assert torch.equal(optimizer.isolation_mask(weight), mask)
        report = optimizer.refresh_isolation_mask().as_dict()
        save_isolation(optimizer, tmp_path / f"{offload}.safetensors")
        stage = optimizer_of(net, offload=offload, importance_beta=0.9, **EXACT)
        stage.carry_importance(optimizer)
        load_isolation(stage, tmp_path / f"{offload}.safetensors", importance=False)
        stage.refresh_isolation_mask()
        train(net, stage, range(6, 9))
        copied = copy.deepcopy(stage)
        assert copied._pipeline is None and copied.state_bytes() == stage.state_bytes()
        runs.append((stage, report, stage.master_weight(weight)))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1] and torch.equal(runs[0][2], runs[1][2])
    assert not torch.equal(runs[0][2], weight.float()), "the copy of the weights has more bits than they"


def test_a_master_weight_waits_for_its_weight(monkeypatch):
    back = pipeline.HostPipeline._return
    monkeypatch.setattr(pipeline.HostPipeline, "_return", lambda *given: (time.sleep(0.01), back(*given)))
    net, optimizer = started("cpu", 2, **EXACT)
    enable_gradient_release(net, optimizer)
    loss_of(net, 2).backward()
    found = optimizer.master_weight(net.embed.weight)
    optimizer.step()
    assert torch.equal(found, optimizer.master_weight(net.embed.weight))


def test_a_backward_that_broke_off_goes_back_to_a_checkpoint():
    class Stop(Exception):
        pass

    net, optimizer = started("cpu", 3)
    enable_gradient_release(net, optimizer)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())

    def stop(grad):
        raise Stop

    handle = net.embed.weight.register_hook(stop)
    with pytest.raises(Stop):
        train(net, optimizer, range(3, 4))
    handle.remove()
    assert optimizer._release.is_open
    optimizer.load_state_dict(saved)  # waits for what is on its way
    net.load_state_dict(weights)
    net.zero_grad()
    train(net, optimizer, range(3, 6))
    assert_same(optimizer, started(None, 6)[1])


# ---------------------------------------------------------------- devices


def test_state_lies_on_the_host_and_nothing_is_made_on_the_device(pinned):  # noqa: F811
    """Parameters that say they are on a GPU, where there is none: whatever is made beside them fails."""
    runs = []
    for on_device in (False, True):
        params = dict(Net(torch.bfloat16).named_parameters())
        if on_device:
            params = {name: param.detach().as_subclass(OnDevice) for name, param in params.items()}
        options = {**INT8, **EXACT, "backend": "auto", "offload": "cpu"}
        optimizer = make(params, **options)
        for step in range(5):
            grads = {name: torch.empty_like(plain(param)) for name, param in params.items()}
            give_gradients(grads, step)
            for name, param in params.items():
                grad = grads[name].grad
                param.grad = grad.as_subclass(OnDevice) if on_device else grad
            optimizer.step()
        fresh = make(params, **options)
        fresh.load_state_dict(optimizer.state_dict())
        stage = make(params, **options)
        stage.carry_importance(fresh)
        stage.refresh_isolation_mask()
        runs.append((fresh, stage))
        tensors = [
            value for one in (fresh, stage) for state in one.state.values() for value in state.values()
        ]
        assert all(value.device.type == "cpu" and type(value) is torch.Tensor for value in tensors)
        assert bool(pinned) == on_device
    for resident, offloaded in zip(*runs, strict=True):
        assert_same_run(resident, offloaded)


def test_rows_are_scored_where_the_states_lie(pinned):  # noqa: F811
    params = {
        name: param.detach().as_subclass(OnDevice) for name, param in Net(torch.bfloat16).named_parameters()
    }
    optimizer = make(params, offload="cpu", backend="auto")
    for param in params.values():
        param.grad = torch.ones_like(plain(param)).as_subclass(OnDevice)
    optimizer.step()
    assert isolate_rows(optimizer, 0.0) == 0 and pinned


def test_a_device_without_copies_is_refused():
    param = torch.nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(NotImplementedError, match="weight is on meta.*CUDA"):
        MaskedEMAAdamW([("weight", param)], offload="cpu")


def test_a_dtensor_is_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        whole = torch.ones(4, 4)
        param = torch.nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Replicate()]))
        with pytest.raises(NotImplementedError, match=r"weight is a DTensor.*leave offload out"):
            MaskedEMAAdamW([("weight", param)], offload="cpu")
        # put in the place of a plain one later, as Accelerate does
        plain_one = torch.nn.Parameter(whole.clone())
        optimizer = MaskedEMAAdamW([("weight", plain_one)], offload="cpu")
        optimizer.param_groups[0]["params"][0] = param
        param.sum().backward()
        with pytest.raises((NotImplementedError, ValueError), match="DTensor"):
            optimizer.step()
        assert torch.equal(param.full_tensor(), whole)
    finally:
        dist.destroy_process_group()


def test_capturable_is_refused():
    with pytest.raises(ValueError, match="offload must be None with capturable=True.*got 'cpu'"):
        MaskedEMAAdamW([torch.nn.Parameter(torch.ones(1))], offload="cpu", capturable=True)


def test_a_backend_of_a_gpu_is_refused():
    with pytest.raises(
        ValueError, match="backend must be 'auto', 'cpu' or 'reference' with offload.*got 'triton'"
    ):
        MaskedEMAAdamW([torch.nn.Parameter(torch.ones(1))], offload="cpu", backend="triton")


def test_what_a_step_refuses_changes_nothing():
    net, optimizer = started("cpu", 3)
    enable_gradient_release(net, optimizer)
    before = snapshot(optimizer)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be"):
        loss_of(net, 3).backward()
    optimizer.param_groups[0]["lr"] = 1e-2
    net.zero_grad()
    assert snapshot(optimizer) == before
    net.first.bias.grad = torch.ones_like(net.first.bias)
    optimizer.state[net.first.bias]["exp_avg"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="'exp_avg' of first.bias.*does not fit"):
        optimizer.step()
