"""torchtune makes MaskedEMAAdamW from our YAML; a torchtune model trains and resumes with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("torchtune", exc_type=ImportError)

from omegaconf import OmegaConf
from torchtune import config
from torchtune.models.llama3 import llama3

import epi_kernels.integrations
from epi_kernels import MaskedEMAAdamW
from python_tests.tiny_model import backend

CONFIG = Path(epi_kernels.integrations.__file__).parent / "configs" / "torchtune.yaml"


def tiny(seed=0):
    torch.manual_seed(seed)
    return llama3(
        vocab_size=300,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=64,
        intermediate_dim=48,
    )


def make(model, **changes):
    section = OmegaConf.merge(OmegaConf.load(CONFIG).optimizer, {"backend": backend(), **changes})
    return config.instantiate(section, model.parameters())  # as the recipes' _setup_optimizer


def steps(model, optimizer, count, first=0):
    for i in range(first, first + count):
        ids = (torch.arange(48).view(4, 12) * (i + 1)) % 300
        optimizer.zero_grad()
        logits = model(ids)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()


def test_the_config_makes_our_optimizer():
    optimizer = make(tiny())
    assert isinstance(optimizer, MaskedEMAAdamW)
    (group,) = optimizer.param_groups
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (2e-5, (0.9, 0.95), 0.01)
    with pytest.raises(ValueError, match="isolation_ratio"):
        make(tiny(), isolation_ratio=2.0)


@pytest.mark.parametrize("state_dtype", [None, "int8"])
def test_a_resumed_run_is_the_whole_one(state_dtype):
    options = {"lr": 2e-3, "isolation_ratio": 0.1, "mask_interval": 2, "state_dtype": state_dtype}
    whole, stopped, resumed = tiny(), tiny(), tiny(seed=9)
    complete, first, second = make(whole, **options), make(stopped, **options), make(resumed, **options)
    steps(whole, complete, 6)
    steps(stopped, first, 3)
    resumed.load_state_dict(stopped.state_dict())
    second.load_state_dict(first.state_dict())
    steps(resumed, second, 3, first=3)
    assert complete.isolation_report().isolated > 0
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert torch.equal(complete.isolation_mask(p), second.isolation_mask(q)), name
