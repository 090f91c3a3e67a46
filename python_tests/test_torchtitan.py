"""torchtitan's optimizer config builds MaskedEMAAdamW, steps it, and its flat state dicts carry the masks."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torchtitan.components.optimizer", exc_type=ImportError)

from epi_kernels.integrations import transformer_block
from epi_kernels.integrations.torchtitan import masked_ema_adamw
from python_tests.tiny_model import backend, steps, tiny_llama


def make(model, **options):
    chosen = {"isolation_ratio": 0.1, "mask_interval": 2, "backend": backend()} | options
    return masked_ema_adamw(lr=2e-3, **chosen).build(model_parts=[model])


def test_the_config_builds_our_optimizer_with_names():
    model = tiny_llama()
    (optimizer,) = make(model, no_isolate=r"embed_tokens", layer_key=transformer_block)
    apart, rest = optimizer.param_groups
    assert apart["isolate"] is False and apart["param_names"] == ["model.embed_tokens.weight"]
    assert (rest["lr"], rest["betas"], rest["weight_decay"]) == (2e-3, (0.9, 0.95), 0.1)
    assert {*apart["param_names"], *rest["param_names"]} == {name for name, _ in model.named_parameters()}


def test_a_flat_state_dict_resumes_with_the_same_bits():
    whole, stopped, resumed = tiny_llama(), tiny_llama(), tiny_llama(seed=9)
    complete = make(whole)
    steps(whole, complete, 6)
    first = make(stopped)
    steps(stopped, first, 3)
    flat = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in first.state_dict().items()}
    assert any(key.endswith("q_proj.weight.isolation_mask") for key in flat)

    resumed.load_state_dict(stopped.state_dict())
    second = make(resumed)
    second.load_state_dict(flat)
    steps(resumed, second, 3, first=3)
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert torch.equal(
            complete.optimizers[0].isolation_mask(p), second.optimizers[0].isolation_mask(q)
        ), name
