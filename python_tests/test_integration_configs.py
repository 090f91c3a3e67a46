"""The configs that ship: each can be read without its tool, and the optimizer takes what it says."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import yaml

from epi_kernels import MaskedEMAAdamW, integrations
from epi_kernels.integrations import transformer_block
from epi_kernels.integrations.llamafactory import build
from epi_kernels.integrations.plain import from_plain
from python_tests.tiny_model import backend, tiny_llama

FOLDER = Path(integrations.__file__).parent / "configs"
# file -> (section with our options, keys there that are the tool's)
SECTIONS = {
    "axolotl.yaml": ("masked_ema_adamw", ()),
    "llamafactory_v1.yaml": ("optim_config", ("name",)),
    "torchtune.yaml": ("optimizer", ("_component_",)),
}


def test_every_config_is_listed():
    assert {path.name for path in FOLDER.glob("*.yaml")} == set(SECTIONS)


@pytest.mark.parametrize("name", SECTIONS)
def test_the_optimizer_takes_what_a_config_says(name):
    section, of_tool = SECTIONS[name]
    given = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))[section]
    options = {key: value for key, value in given.items() if key not in of_tool}
    optimizer = build(tiny_llama(), {"lr": 1e-3, "backend": backend()} | options)
    assert optimizer.param_groups[0]["lr"] == options.get("lr", 1e-3)
    component = given.get("_component_")
    if component is not None:
        module, attribute = component.rsplit(".", 1)
        assert getattr(importlib.import_module(module), attribute) is MaskedEMAAdamW


def test_plain_options_get_their_meaning():
    plain = {
        "state_dtype": "bfloat16",
        "importance_dtype": "int8",
        "layer_key": "block",
        "scope": "layer",
        "seed": 3,
    }
    assert from_plain(plain) == plain | {"state_dtype": torch.bfloat16, "layer_key": transformer_block}
    for wrong in ({"state_dtype": "float8"}, {"layer_key": "tensor"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            build(tiny_llama(), {"lr": 1e-3, **wrong})
