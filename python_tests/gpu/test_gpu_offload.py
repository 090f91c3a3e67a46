"""offload="cpu" on the device: real streams and pinned memory, the bits of a run that stays there."""

from __future__ import annotations

import pytest
import torch

from epi_kernels import MaskedEMAAdamW, enable_gradient_release
from epi_kernels.isolation import isolate_rows

pytestmark = pytest.mark.gpu

STEPS = 200
CONFIGS = {
    "float32": (torch.float32, {}),
    "exact copy of bfloat16 weights": (torch.bfloat16, {"master_weight_bits": 32}),
    "8-bit": (torch.bfloat16, {"state_dtype": "int8", "importance_beta": 0.9, "importance_dtype": "int8"}),
}


def run(device, dtype, *, steps=STEPS, released, width=192, **options):
    """(optimizer, its refreshes): the same gradients on any device and for any optimizer of the same bits."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(width, width), (width,), (3 * width, width), (7,), ()]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(5)]
    params = torch.nn.ParameterList([torch.nn.Parameter(one.to(device, dtype)) for one in made])
    optimizer = MaskedEMAAdamW(
        params.named_parameters(), lr=1e-2, isolation_ratio=0.2, mask_interval=7, **options
    )
    if released:
        enable_gradient_release(params, optimizer)
    reports = []
    for step in range(steps):
        # the gradient of a sum of products is the other factor, to the bit
        factors = [grad.to(device, dtype) for grad in grads[step % len(grads)]]
        sum((param * factor).sum() for param, factor in zip(params, factors, strict=True)).backward()
        optimizer.step()
        optimizer.zero_grad()
        report = optimizer.isolation_report()
        if report is not None and report.step == step + 1:
            reports.append(report.as_dict())
    return optimizer, reports


@pytest.mark.parametrize("released", [False, True], ids=["at once", "released"])
@pytest.mark.parametrize(("dtype", "options"), CONFIGS.values(), ids=CONFIGS.keys())
def test_offloaded_and_resident_runs_agree(dtype, options, released, backend, device):
    resident, reports = run(device, dtype, released=False, backend=backend.name, **options)
    offloaded, its_reports = run(device, dtype, released=released, offload="cpu", **options)
    assert reports == its_reports and len(reports) == STEPS // 7
    for one, other in zip(
        resident.param_groups[0]["params"], offloaded.param_groups[0]["params"], strict=True
    ):
        assert other.device == one.device and torch.equal(one, other)
        for key, value in resident.state[one].items():
            host = offloaded.state[other][key]
            assert host.device.type == "cpu" and torch.equal(value.cpu(), host)
            assert device.type == "cpu" or key == "step" or host.is_pinned()


def test_a_large_ring_of_copies_is_waited_for(device):
    """Matrices whose copies take milliseconds: what is not waited for is not there yet."""
    dtype, options = CONFIGS["8-bit"]
    width = 2048 if device.type == "cuda" else 64
    runs = [
        run(device, dtype, steps=8, released=True, width=width, offload=offload, backend="auto", **options)[0]
        for offload in (None, "cpu")
    ]
    for one, other in zip(*(optimizer.param_groups[0]["params"] for optimizer in runs), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(runs[0].isolation_mask(one), runs[1].isolation_mask(other))


def test_weights_wait_for_the_backward_pass_that_reads_them(device):
    """A chain of products: what one matrix hands down is made of its weight, which is written meanwhile."""
    width, n_layers = (2048, 12) if device.type == "cuda" else (64, 3)
    runs = []
    for offload in (None, "cpu"):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(width, width, bias=False) for _ in range(n_layers)]
        inputs = torch.randn(2 * width, width).to(device, torch.bfloat16)
        net = torch.nn.Sequential(*layers).to(device, torch.bfloat16)
        before = [param.detach().clone() for param in net.parameters()]
        optimizer = MaskedEMAAdamW(
            net.named_parameters(),
            lr=1e-3,
            mask_interval=3,
            isolation_ratio=0.2,
            state_dtype="int8",
            offload=offload,
        )
        enable_gradient_release(net, optimizer)
        for _ in range(8):
            net(inputs).square().mean().backward()
            optimizer.step()
        after = [param.detach().clone() for param in net.parameters()]
        assert not any(map(torch.equal, before, after)) and all(one.isfinite().all() for one in after)
        runs.append(after)
    assert all(map(torch.equal, *runs))


def test_a_state_dict_comes_back_to_the_host(device):
    dtype, options = CONFIGS["8-bit"]
    optimizer, _ = run(device, dtype, steps=9, released=True, offload="cpu", **options)
    params = optimizer.param_groups[0]["params"]
    names = optimizer.param_groups[0]["param_names"]
    resident = MaskedEMAAdamW(list(zip(names, params, strict=True)), **options)
    resident.load_state_dict(optimizer.state_dict())
    back = MaskedEMAAdamW(list(zip(names, params, strict=True)), offload="cpu", **options)
    back.load_state_dict(resident.state_dict())
    for param in params:
        assert resident.state[param]["exp_avg"].device == param.device
        for key, value in optimizer.state[param].items():
            assert back.state[param][key].device.type == "cpu" and torch.equal(value, back.state[param][key])


def test_rows_are_isolated_alike(device):
    """Their scores lie with the states on the host, their masks are given with the weights."""
    dtype, options = CONFIGS["8-bit"]
    runs = [
        run(device, dtype, steps=3, released=False, offload=offload, **options)[0]
        for offload in (None, "cpu")
    ]
    counts = [[isolate_rows(optimizer, share) for share in (0.1, 0.3)] for optimizer in runs]
    assert counts[0] == counts[1] and 0 < counts[0][0] < counts[0][1]
    for one, other in zip(*(optimizer.param_groups[0]["params"] for optimizer in runs), strict=True):
        assert torch.equal(runs[0].isolation_mask(one), runs[1].isolation_mask(other))
