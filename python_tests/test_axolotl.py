"""Axolotl finds our plugin, its config takes our options, its trainer steps with our optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
import yaml

base = pytest.importorskip("axolotl.integrations.base", exc_type=ImportError)

from axolotl.core.trainers.mixins.optimizer import OptimizerMixin  # noqa: E402
from axolotl.utils.dict import DictDefault  # noqa: E402

import epi_kernels.integrations  # noqa: E402
from epi_kernels import MaskedEMAAdamW  # noqa: E402
from python_tests.test_transformers_trainer import Tokens, arguments, ours  # noqa: E402
from python_tests.tiny_model import backend, tiny_llama  # noqa: E402

CONFIG = Path(epi_kernels.integrations.__file__).parent / "configs" / "axolotl.yaml"
RATES = ("loraplus_lr_ratio", "embedding_lr_scale", "embedding_lr", "lr_groups")


@pytest.fixture
def manager():
    made = base.PluginManager.get_instance()
    for name in yaml.safe_load(CONFIG.read_text())["plugins"]:
        made.register(name)
    yield made
    made.plugins.clear()


class Trainer(OptimizerMixin, transformers.Trainer):
    """How Axolotl's own trainer makes its optimizer."""


def trainer(folder, kind=Trainer, **rates):
    args = arguments(folder)
    for name in RATES:
        setattr(args, name, rates.get(name))
    return kind(tiny_llama(), args, train_dataset=Tokens())


def config(**changes):
    given = yaml.safe_load(CONFIG.read_text())
    given["masked_ema_adamw"] |= {"backend": backend(), "mask_interval": 2, "isolation_ratio": 0.1}
    return DictDefault(given | changes)


def test_axolotls_own_validation_accepts_the_config(manager):
    from axolotl.integrations.config import merge_input_args

    assert len(manager.plugins) == 1
    _, validator = merge_input_args()
    validated = validator(**yaml.safe_load(CONFIG.read_text()))
    assert validated.masked_ema_adamw["layer_key"] == "block"
    assert validated.optimizer == "adamw_torch"


@pytest.mark.parametrize("kind", [Trainer, transformers.Trainer], ids=["axolotl", "transformers"])
def test_the_trainer_steps_with_our_optimizer(manager, tmp_path, kind):
    running = trainer(tmp_path, kind)
    manager.post_trainer_create(config(), running)
    running.train()
    assert isinstance(ours(running), MaskedEMAAdamW)
    assert ours(running).param_groups[0]["betas"] == (0.8, 0.95)
    rows = {row.name for row in ours(running).isolation_report().layers}
    assert {"model.layers.0", "model.layers.1"} <= rows
    assert not ours(running).isolation_mask(running.model.model.embed_tokens.weight).any()
    assert [line["step"] for line in running.state.log_history if "isolation/share" in line] == [2, 4, 6]


@pytest.mark.parametrize("name", RATES)
def test_rates_by_group_are_refused(manager, tmp_path, name):
    with pytest.raises(ValueError, match=name):
        manager.post_trainer_create(config(), trainer(tmp_path, **{name: 2.0}))


def test_another_optimizer_of_axolotls_own_is_refused(manager, tmp_path):
    running = trainer(tmp_path)
    running.optimizer_cls_and_kwargs = (object, {})
    with pytest.raises(ValueError, match="optimizer: muon"):
        manager.post_trainer_create(config(optimizer="muon"), running)
