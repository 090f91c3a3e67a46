"""LLaMA-Factory v1 reads our config, finds our plugin and steps with our optimizer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import epi_kernels.integrations
from epi_kernels import MaskedEMAAdamW
from epi_kernels.integrations import llamafactory as integration
from python_tests.tiny_model import backend, tiny_llama

CONFIG = Path(epi_kernels.integrations.__file__).parent / "configs" / "llamafactory_v1.yaml"


def step(model, optimizer):
    ids = torch.arange(48).view(4, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def test_what_the_plugin_makes_of_its_config():
    model = tiny_llama()
    plain = {
        "lr": 1e-3,
        "weight_decay": 0.2,
        "state_dtype": "bfloat16",
        "layer_key": "block",
        "mask_interval": 1,
    }
    optimizer = integration.build(
        model, {"name": integration.NAME, **plain, "isolate": ["self_attn"], "backend": backend()}
    )
    taking_part, *others = optimizer.param_groups
    assert taking_part["weight_decay"] == 0.2 and all(
        "self_attn" in name for name in taking_part["param_names"]
    )
    assert all(group["isolate"] is False for group in others)
    step(model, optimizer)
    assert {row.name for row in optimizer.isolation_report().layers} >= {"model.layers.0", "model.layers.1"}
    assert optimizer.state[model.model.norm.weight]["exp_avg"].dtype == torch.bfloat16


def test_a_learning_rate_is_asked_for():
    with pytest.raises(ValueError, match="optim_config needs lr"):
        integration.build(tiny_llama(), {"name": integration.NAME})


def test_llamafactory_itself_makes_our_optimizer(monkeypatch):
    base_trainer = pytest.importorskip("llamafactory.v1.core.base_trainer", exc_type=ImportError)
    from llamafactory.v1.config import get_args

    monkeypatch.setattr(
        "sys.argv", ["llamafactory", str(CONFIG), f"optim_config.backend={backend()}", "bf16=false"]
    )
    _, _, training_args, _ = get_args()
    integration.register()
    model = tiny_llama()
    trainer = SimpleNamespace(args=training_args, model=model, optimizer=None)
    base_trainer.BaseTrainer._init_optimizer(trainer)
    assert isinstance(trainer.optimizer, MaskedEMAAdamW)
    assert trainer.optimizer.param_groups[0]["lr"] == 2e-5
    step(model, trainer.optimizer)
