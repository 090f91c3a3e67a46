"""Models made from configs: what a config may hold."""

from __future__ import annotations

import copy

import pytest
import yaml

from epi_kernels import cli
from epi_kernels.repro.config import ModelSpec
from epi_kernels.repro.contents import specs_of
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.models import new_model, refuse_unknown_keys
from epi_kernels.repro.preset import PRESETS, load_preset


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_shipped_configs_have_no_unknown_key(name):
    for spec in specs_of(load_preset(name)):
        if isinstance(spec, ModelSpec):
            refuse_unknown_keys(spec)


def test_keys_by_earlier_and_other_names():
    refuse_unknown_keys(
        ModelSpec(config={"model_type": "llama", "rope_theta": 1e4, "tie_word_embeddings": True})
    )
    refuse_unknown_keys(ModelSpec(config={"model_type": "gpt2", "n_embd": 32, "num_hidden_layers": 1}))
    refuse_unknown_keys(ModelSpec(checkpoint="someone/model"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "num_hidden_layer": 2}, "config: llama has no num_hidden_layer"),
        ({"model_type": "lama"}, "transformers knows no model_type 'lama'"),
        ({"hidden_size": 64}, "transformers knows no model_type None"),
        (
            {"model_type": "llava", "text_config": {"hiden_size": 8}},
            "config.text_config: llama has no hiden_size",
        ),
        (
            {"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model", "heads": 2}},
            "config.vision_config: siglip_vision_model has no heads",
        ),
    ],
)
def test_an_unknown_key_of_a_config_is_refused_before_anything_is_made(tmp_path, capsys, config, message):
    """transformers makes another model of it without a word."""
    with pytest.raises(ReproError, match=message):
        refuse_unknown_keys(ModelSpec(config=copy.deepcopy(config)))
    preset = yaml.safe_load((PRESETS / "small.yaml").read_text()) | {"models": {"m": {"config": config}}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(preset))
    out = tmp_path / "out"
    assert cli.main(["reproduce", "--preset", str(tmp_path / "p.yaml"), "--out", str(out), "--dry-run"]) == 2
    assert message in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 3},
            "hidden size .32. is not a multiple",
        ),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "t5"}, "makes no model"),
    ],
)
def test_a_config_that_makes_no_model_is_said_in_a_line(config, message):
    with pytest.raises(ReproError, match=message) as error:
        new_model(ModelSpec(config=config), 0)
    assert "\n" not in str(error.value)
