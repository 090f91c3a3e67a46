"""peft's LoRA with MaskedEMAAdamW: the base is left alone, adapters are isolated like any weight."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from epi_kernels import MaskedEMAAdamW
from epi_kernels.integrations import named_parameter_groups, transformer_block
from python_tests.tiny_model import backend, steps, tiny_llama


def lora(dtype=None):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(1)
    return get_peft_model(tiny_llama(dtype=dtype), config, autocast_adapter_dtype=False)


def make(model, **options):
    return MaskedEMAAdamW(
        named_parameter_groups(model, weight_decay=0.1),
        lr=1e-2,
        isolation_ratio=0.2,
        layer_key=transformer_block,
        backend=backend(),
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_are_isolated_and_the_base_keeps_its_bits(dtype):
    model = lora(dtype)
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    optimizer = make(model, mask_interval=None)
    held = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert held == list(adapters) and all(p.dtype == dtype for p in adapters.values())

    steps(model, optimizer, 2)
    report = optimizer.refresh_isolation_mask()
    assert {row.name for row in report.layers} == {"model.layers.0", "model.layers.1"}
    elements = sum(p.numel() for p in adapters.values())
    assert report.isolated >= int(0.2 * elements)

    masks = {n: optimizer.isolation_mask(p) for n, p in adapters.items()}
    before = {n: p.detach().clone() for n, p in adapters.items()}
    steps(model, optimizer, 4, first=2)
    for name, p in adapters.items():
        assert torch.equal(p[masks[name]], before[name][masks[name]]), name
        assert not torch.equal(p, before[name]), name
    assert sum(int(mask.sum()) for mask in masks.values()) == report.isolated
    for name, p in model.named_parameters():
        if name in base:
            assert p.grad is None and torch.equal(p, base[name]), name


def test_saved_adapters_and_state_continue_with_the_same_bits(tmp_path):
    whole, stopped = lora(), lora()
    optimizer = make(whole, mask_interval=2)
    steps(whole, optimizer, 6)

    first = make(stopped, mask_interval=2)
    steps(stopped, first, 3)
    stopped.save_pretrained(tmp_path)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")

    resumed = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    second = make(resumed, mask_interval=2)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(resumed, second, 3, first=3)
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
        if p.requires_grad:
            assert torch.equal(optimizer.isolation_mask(p), second.isolation_mask(q)), name
