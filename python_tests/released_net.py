"""A small net of awkward parameters and its loops, with gradient release and without it."""

from __future__ import annotations

import torch

from epi_kernels import MaskedEMAAdamW
from python_tests.harness import assert_same_run, make


class Net(torch.nn.Module):
    """A tied weight, a branch that only some batches take, a 0-dim and an empty parameter."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, scale_shape: tuple[int, ...] = ()):
        super().__init__()
        torch.manual_seed(0)
        self.scale = torch.nn.Parameter(torch.ones(scale_shape))
        self.nothing = torch.nn.Parameter(torch.empty(0))
        self.embed = torch.nn.Embedding(19, 72)
        self.first = torch.nn.Linear(72, 72)
        self.branch = torch.nn.Linear(72, 72)
        self.norm = torch.nn.LayerNorm(72)
        self.to(dtype)

    def forward(self, tokens, *, branch: bool):
        x = self.first(self.embed(tokens)).tanh()
        if branch:
            x = self.branch(x)
        return self.norm(x * self.scale) @ self.embed.weight.t()


def loss_of(net: torch.nn.Module, step: int) -> torch.Tensor:
    tokens = torch.randint(19, (4, 5), generator=torch.Generator().manual_seed(step))
    return torch.nn.functional.cross_entropy(
        net(tokens, branch=step % 3 == 0).flatten(0, 1), tokens.flatten()
    )


def optimizer_of(net: torch.nn.Module, **options) -> MaskedEMAAdamW:
    return make(dict(net.named_parameters()), **({"backend": "cpu"} | options))


def train(net, optimizer, steps, *, backwards: int = 1, after=lambda step: None) -> list[dict]:
    """The reports of the refreshes; ``after``: is called after every step."""
    reports = []
    for step in steps if isinstance(steps, range) else range(steps):
        for i in range(backwards):
            loss_of(net, 100 * i + step).backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step)
        report = optimizer.isolation_report()
        if report is not None and report.step == optimizer.param_groups[0]["isolation_step"]:
            reports.append(report.as_dict())
    return reports


def assert_same(a, b) -> None:
    """Runs, and the order of what a state dict holds."""
    assert_same_run(a, b)
    assert list(a.state_dict()["state"]) == list(b.state_dict()["state"])


def both(body, **options):
    """``body(net, optimizer, released)`` with and without release gives the same bits. Returns the released optimizer."""
    runs = []
    for released in (False, True):
        net = Net()
        optimizer = optimizer_of(net, **options)
        body(net, optimizer, released)
        runs.append(optimizer)
    assert_same(*runs)
    return runs[1]
