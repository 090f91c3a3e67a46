"""trl.SFTTrainer with MaskedEMAAdamW: whole models and LoRA, refreshes logged, importance carried, resumes."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from epi_kernels.integrations import add_isolation_callback, masked_ema_adamw, transformer_block
from python_tests.test_transformers_trainer import assert_isolated_kept, ours
from python_tests.tiny_model import backend, qa, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer([text for record in qa(32) for text in record.values()])


def trainer(folder, tokenizer, model=None, peft=None, saving=False, records=qa(32), **options):  # noqa: B008
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        weight_decay=0.03,
        max_length=64,
        logging_steps=1,
        save_strategy="steps" if saving else "no",
        save_steps=3,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=3,
    )
    chosen = {"backend": backend(), "isolation_ratio": 0.1, "mask_interval": 2} | options
    made = SFTTrainer(
        model or tiny_llama(),
        args,
        train_dataset=Dataset.from_list(list(records)),
        processing_class=tokenizer,
        peft_config=peft,
        optimizer_cls_and_kwargs=masked_ema_adamw(args, **chosen),
    )
    return made


def test_refreshes_are_logged_and_isolate_the_share_asked_for(tmp_path, tokenizer):
    running = trainer(tmp_path, tokenizer, layer_key=transformer_block)
    add_isolation_callback(running)
    running.train()
    assert ours(running).param_groups[0]["lr"] < 2e-3 == running.args.learning_rate  # the schedule's
    logged = [line for line in running.state.log_history if "isolation/share" in line]
    assert [line["step"] for line in logged] == [2, 4, 6]
    assert all(0.09 < line["isolation/share"] < 0.12 for line in logged)
    rows = {row.name for row in ours(running).isolation_report().layers}
    assert {"model.layers.0", "model.layers.1"} <= rows


def test_a_second_stage_keeps_what_the_first_one_needed(tmp_path, tokenizer):
    model = tiny_llama()
    first = trainer(tmp_path / "a", tokenizer, model)
    first.train()
    second = trainer(tmp_path / "b", tokenizer, model, records=qa(32, first=500), mask_interval=100)
    add_isolation_callback(second, carry=ours(first))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    second.train()
    assert_isolated_kept(second, model, before)


def test_lora_adapters_are_isolated_and_the_base_is_left_alone(tmp_path, tokenizer):
    model = tiny_llama()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    running = trainer(tmp_path, tokenizer, model, peft, layer_key=transformer_block)
    add_isolation_callback(running)
    running.train()
    names = [name for group in ours(running).param_groups for name in group["param_names"]]
    assert len(names) == 8 and all("lora_" in name for name in names)
    for name, p in running.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, base[name.replace(".base_layer", "")]), name
    assert {row.name for row in ours(running).isolation_report().layers} == {
        "model.layers.0",
        "model.layers.1",
    }
    elements = sum(p.numel() for p in running.model.parameters() if p.requires_grad)
    assert ours(running).isolation_report().isolated >= int(0.1 * elements)


def test_a_resumed_run_is_the_whole_one(tmp_path, tokenizer):
    whole_model, model = tiny_llama(), tiny_llama(seed=9)
    whole = trainer(tmp_path / "whole", tokenizer, whole_model)
    whole.train()
    trainer(tmp_path / "parts", tokenizer, saving=True).train()
    resumed = trainer(tmp_path / "parts", tokenizer, model, saving=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    for p, q in zip(whole_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(ours(whole).isolation_mask(p), ours(resumed).isolation_mask(q))
