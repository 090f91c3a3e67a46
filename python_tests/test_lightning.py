"""lightning.Trainer with MaskedEMAAdamW: closures, accumulation, clipping, and a resume that is exact."""

from __future__ import annotations

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from epi_kernels import MaskedEMAAdamW
from epi_kernels.integrations import named_parameter_groups, transformer_block
from python_tests.simulated_device import OnDevice, simulated  # noqa: F401
from python_tests.test_transformers_trainer import Tokens
from python_tests.tiny_model import backend, tiny_llama

STEPS_AN_EPOCH = 3


class Module(lightning.LightningModule):
    def __init__(self, seed=0, **options):
        super().__init__()
        self.model, self.options = tiny_llama(seed), options

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return MaskedEMAAdamW(
            named_parameter_groups(self.model, weight_decay=0.03),
            lr=2e-3,
            isolation_ratio=0.1,
            mask_interval=2,
            backend=backend(),
            **self.options,
        )


def batches():
    return DataLoader(Tokens(), batch_size=4)


def fit(module, folder, epochs, resume=None):
    """``STEPS_AN_EPOCH`` steps an epoch, each of two batches, its gradient clipped."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        limit_train_batches=2 * STEPS_AN_EPOCH,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches(), ckpt_path=resume, weights_only=True)
    return trainer


def test_a_run_is_the_plain_loops(tmp_path):
    module, twin = Module(), Module()
    trainer = fit(module, tmp_path, epochs=2)
    assert trainer.global_step == 2 * STEPS_AN_EPOCH
    optimizer = twin.configure_optimizers()
    order = [
        p for group in optimizer.param_groups for p in group["params"]
    ]  # the norm's last bit depends on it
    for _ in range(2):
        for i, batch in enumerate(batches()):
            if i == 2 * STEPS_AN_EPOCH:
                break
            (twin.model(**batch).loss / 2).backward()
            if i % 2:
                torch.nn.utils.clip_grad_norm_(order, 0.5)
                optimizer.step()
                optimizer.zero_grad()
    for (name, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16, "layer_key": transformer_block}])
def test_a_resumed_run_is_the_whole_one(tmp_path, options):
    whole, first, resumed = Module(**options), Module(**options), Module(seed=9, **options)
    complete = fit(whole, tmp_path, epochs=2)
    fit(first, tmp_path, epochs=1).save_checkpoint(tmp_path / "last.ckpt")
    at_resume = []
    resumed.on_train_start = lambda: at_resume.extend(
        resumed.optimizers().optimizer.isolation_mask(p) for p in resumed.parameters()
    )
    continued = fit(resumed, tmp_path, epochs=2, resume=tmp_path / "last.ckpt")
    assert any(bool(mask.any()) for mask in at_resume)
    (own,), (other,) = complete.optimizers, continued.optimizers
    assert other.param_groups[0]["isolation_step"] == 2 * STEPS_AN_EPOCH
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert torch.equal(own.isolation_mask(p), other.isolation_mask(q)), name


def test_states_that_lightning_moves_beside_their_parameters_come_back_to_the_host(
    tmp_path,
    simulated,  # noqa: F811
    monkeypatch,
):
    """It does so when it resumes, whatever the optimizer."""
    options = {"offload": "cpu", "state_dtype": "int8"}
    whole, first, resumed = Module(**options), Module(**options), Module(seed=9, **options)
    fit(whole, tmp_path, epochs=2)
    fit(first, tmp_path, epochs=1).save_checkpoint(tmp_path / "last.ckpt")
    seen = []

    def look():
        states = resumed.optimizers().optimizer.state.values()
        seen.append({type(value) for state in states for key, value in state.items() if key != "step"})

    resumed.on_train_start = resumed.on_train_end = look
    monkeypatch.setattr(
        "lightning.fabric.utilities.optimizer.move_data_to_device",
        lambda value, device: value.as_subclass(OnDevice),
    )
    fit(resumed, tmp_path, epochs=2, resume=tmp_path / "last.ckpt")
    assert seen == [{OnDevice}, {torch.Tensor}]
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
