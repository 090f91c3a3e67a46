"""Parameter groups and layers: who decays, who takes part, what is one block, behind any wrapper."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from epi_kernels import MaskedEMAAdamW, integrations
from epi_kernels.integrations import named_parameter_groups, transformer_block
from python_tests.test_imports import BLOCKER, run_python
from python_tests.tiny_model import backend, tiny_llama

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
MODELS = {
    "llama": {},
    "mistral": {},
    "qwen3": SMALL | {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8},
    "gemma3_text": SMALL | {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8},
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_head": 2, "n_layer": 2},
    "gpt_neox": SMALL | {"intermediate_size": 24},
}


def tiny(kind, **changes):
    return tiny_llama(model_type=kind, **(MODELS[kind] | changes))


def names_of(group) -> list[str]:
    return [name for name, _ in group["params"]]


# ---- groups ----


@pytest.mark.parametrize("kind", MODELS)
def test_who_decays_is_the_trainers_rule(kind):
    model = tiny(kind)
    decaying, plain = named_parameter_groups(model, weight_decay=0.1)
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    theirs = set(transformers.Trainer.get_decay_parameter_names(None, model))
    own = [name for name, _ in model.named_parameters()]  # tied ones once, the order kept
    assert names_of(decaying) == [name for name in own if name in theirs]
    assert names_of(plain) == [name for name in own if name not in theirs]
    assert names_of(plain) and all(param.ndim == 1 for _, param in plain["params"])


def test_decaying_takes_the_place_of_the_rule():
    model = tiny("llama")
    chosen = {"model.norm.weight"}
    decaying, plain = named_parameter_groups(model, weight_decay=0.1, decaying=chosen)
    assert names_of(decaying) == ["model.norm.weight"] and "model.norm.weight" not in names_of(plain)


def test_frozen_parameters_are_left_out_unless_asked_for():
    model = tiny("llama")
    model.model.layers[0].requires_grad_(False)
    held = [name for group in named_parameter_groups(model) for name in names_of(group)]
    assert held and not any(name.startswith("model.layers.0.") for name in held)
    whole = named_parameter_groups(model, include_frozen=True)
    assert sum(len(group["params"]) for group in whole) == len(list(model.parameters()))


def test_a_group_without_parameters_is_left_out():
    assert len(named_parameter_groups(nn.Linear(2, 3, bias=False))) == 1
    assert named_parameter_groups(nn.ReLU()) == []


def test_isolate_and_no_isolate_choose_by_regular_expression():
    model = tiny("llama")
    groups = named_parameter_groups(model, isolate=[r"self_attn", r"norm"], no_isolate=r"\.1\.")
    parts = {
        (group.get("isolate", True), group["weight_decay"] > 0): set(names_of(group)) for group in groups
    }
    assert [group.get("isolate", True) for group in groups] == [True, True, False, False]
    assert parts[True, False] == {
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    }
    assert parts[True, True] == {f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkvo"}
    assert "model.embed_tokens.weight" in parts[False, True]
    MaskedEMAAdamW(groups, backend=backend())


def test_only_what_takes_part_is_isolated():
    model = tiny("llama")
    groups = named_parameter_groups(model, no_isolate=r"embed_tokens")
    optimizer = MaskedEMAAdamW(groups, isolation_ratio=0.2, mask_interval=1, backend=backend())
    ids = torch.arange(24).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not optimizer.isolation_mask(model.model.embed_tokens.weight).any()
    eligible = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    assert optimizer.isolation_report().isolated >= int(0.2 * eligible) > 0


def test_a_tied_parameter_is_found_under_either_name():
    model = tiny("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    groups = named_parameter_groups(model, no_isolate=r"^lm_head")
    (apart,) = [group for group in groups if group.get("isolate") is False]
    assert names_of(apart) == ["model.embed_tokens.weight"]


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"no parameter's name matches 'q_porj'"):
        named_parameter_groups(tiny("llama"), isolate=[r"k_proj", r"q_porj"])
    with pytest.raises(ValueError, match=r"'lm_haed'"):
        named_parameter_groups(tiny("llama"), no_isolate=r"lm_haed")


@pytest.fixture
def one_process():
    """A process group of one, for DDP."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_wrappers_change_neither_names_nor_groups(one_process):
    plain, model = tiny("gpt2"), tiny("gpt2")
    for i, block in enumerate(model.transformer.h):
        model.transformer.h[i] = checkpoint_wrapper(block)
    wrapped = DistributedDataParallel(torch.compile(model))
    assert any(name.startswith("module._orig_mod.") for name, _ in wrapped.named_parameters())
    made = named_parameter_groups(wrapped, isolate=r"^transformer\.h\.0\.")
    expected = named_parameter_groups(plain, isolate=r"^transformer\.h\.0\.")
    assert [names_of(group) for group in made] == [names_of(group) for group in expected]
    held = {id(param) for group in made for _, param in group["params"]}
    assert held == {id(param) for param in wrapped.parameters()}


def test_a_module_of_ones_own_named_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    held = {name for group in named_parameter_groups(model) for name in names_of(group)}
    assert held == {"module.weight", "module.bias", "head.weight", "head.bias"}


# ---- layers ----

BLOCKS = {
    "model.layers.11.mlp.up_proj.weight": "model.layers.11",
    "model.layers.3.mlp.experts.5.w1.weight": "model.layers.3",
    "transformer.h.3.attn.bias": "transformer.h.3",
    "gpt_neox.layers.2.attention.dense.weight": "gpt_neox.layers.2",
    "layers.2.attention.dense.weight": "layers.2",
    "bert.encoder.layer.0.output.dense.weight": "bert.encoder.layer.0",
    "encoder.block.1.layer.0.SelfAttention.q.weight": "encoder.block.1",
    "vision_tower.encoder.layers.0.fc.weight": "vision_tower.encoder.layers.0",
}
OUTSIDE = [
    "model.embed_tokens.weight",
    "lm_head.weight",
    "transformer.wte.weight",
    "layers.0",
    "layer1.0.weight",
]
WRAPPERS = ["", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod.", "base_model.model."]


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_a_block_is_everything_of_one_layer(prefix):
    for name, block in BLOCKS.items():
        assert transformer_block(prefix + name) == block
    for name in OUTSIDE:
        assert transformer_block(prefix + name) == prefix + name


def test_wrappers_inside_a_name():
    name = "module._orig_mod.base_model.model.model.layers.7._fsdp_wrapped_module.self_attn"
    assert (
        transformer_block(f"{name}._checkpoint_wrapped_module.q_proj.lora_A.default.weight")
        == "model.layers.7"
    )


@pytest.mark.parametrize("kind", MODELS)
def test_a_models_layers_are_its_blocks(kind):
    model = tiny(kind)
    optimizer = MaskedEMAAdamW(
        named_parameter_groups(model), layer_key=transformer_block, mask_interval=1, backend=backend()
    )
    ids = torch.arange(24).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    rows = {row.name: row.elements for row in optimizer.isolation_report().layers}
    inside = {name for name in rows if name.endswith((".0", ".1"))}
    outside = {name for name, _ in model.named_parameters() if transformer_block(name) == name}
    assert len(inside) == 2 and rows.keys() == inside | outside
    for block in inside:
        own = sum(p.numel() for n, p in model.named_parameters() if n.startswith(f"{block}."))
        assert rows[block] == own


# ---- the package ----


def test_groups_and_layers_need_no_transformers():
    blocked = ["transformers", "accelerate", "trl", "peft", "lightning"]
    code = BLOCKER.format(blocked=blocked) + (
        "import torch\n"
        "from epi_kernels.integrations import named_parameter_groups, transformer_block\n"
        "print(len(named_parameter_groups(torch.nn.Linear(2, 2))), transformer_block('h.0.w'))"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2 h.0"


def test_public_names():
    assert set(integrations._LAZY) == set(integrations.__all__) <= set(dir(integrations))
    for name in integrations.__all__:
        assert callable(getattr(integrations, name))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = integrations.nonsense
