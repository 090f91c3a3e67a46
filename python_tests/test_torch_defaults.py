"""torch's default dtype and default device are the caller's: they change nothing here."""

from __future__ import annotations

import contextlib

import pytest
import torch

from python_tests.harness import Target, make

CONFIGURATIONS = {
    "default": {},
    "zscore": {"normalization": "zscore"},
    "layer-hysteresis": {"normalization": "none", "scope": "layer", "hysteresis": 0.2},
    "int8-master": {
        "state_dtype": "int8",
        "importance_beta": 0.9,
        "importance_dtype": "int8",
        "master_weight_bits": 24,
    },
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "device": lambda: torch.device("meta"),  # whatever is made there by mistake has no values
}


def run(arguments: dict, target: Target, surroundings: contextlib.AbstractContextManager) -> tuple:
    """Weights, masks and figures after steps, refreshes and a round trip of the state."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=generator, device="cpu", dtype=torch.float32) for n in (4900, 4100)]
    params = {
        "wide": torch.nn.Parameter(values[0].view(70, 70).to(target.device)),
        "narrow": torch.nn.Parameter(values[1].bfloat16().to(target.device)),
    }
    with surroundings:
        optimizer = make(params, backend=target.backend, **arguments)
        for _ in range(3):
            for p in params.values():
                p.grad = p.detach().clone()
            optimizer.step()
        optimizer.set_isolation_mask(params["wide"], params["wide"].detach() > 1, persistent=True)
        optimizer.load_state_dict(optimizer.state_dict())
        report = optimizer.refresh_isolation_mask()
        figures = (report.isolated, report.threshold, report.jaccard, report.ties)
        optimizer.carry_importance(optimizer.state_dict())
        optimizer.refresh_isolation_mask()
    found = [p.detach() for p in params.values()] + list(map(optimizer.isolation_mask, params.values()))
    return figures, [tensor.cpu() for tensor in found + [optimizer.master_weight(params["narrow"])]]


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_same_bits_under_any_default(name: str, default: str, target: Target):
    if target.interpreted and (name, default) != ("default", "bfloat16"):
        pytest.skip("minutes in the interpreter")
    arguments = CONFIGURATIONS[name]
    figures, tensors = run(arguments, target, contextlib.nullcontext())
    other_figures, others = run(arguments, target, DEFAULTS[default]())
    assert figures == other_figures
    assert all(map(torch.equal, tensors, others))
