"""The paper preset at toy size: config-made checkpoints, data in the original formats, a judge next door."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from epi_kernels.finetune.chat import ensure_template, train_tokenizer
from epi_kernels.repro.config import TaskSpec
from epi_kernels.repro.evaluate import encode_task, make_batch
from epi_kernels.repro.methods.base import token_loss
from epi_kernels.repro.preset import PRESETS
from epi_kernels.repro.tasks import REAL, make_task

ARCHITECTURES = {"LLaMA-2-7B": "llama", "Mistral-8B": "mistral", "Qwen1.5-7B": "qwen2", "Gemma-9B": "gemma2"}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
LEARNED = ("gsm8k", "codealpaca", "logiqa", "alpaca", "ultrachat")


def paper() -> dict[str, Any]:
    """The preset as it is shipped."""
    return yaml.safe_load((PRESETS / "paper.yaml").read_text(encoding="utf-8"))


def make_checkpoints(
    folder: Path, data: dict[str, Path], names: Iterable[str], steps: int = 20
) -> dict[str, Path]:
    """One a name: random weights, trained for a moment to answer "7", so that answers come to an end."""
    examples = [
        one
        for kind in LEARNED
        for one in make_task(TaskSpec(kind=kind, source=str(data[kind]))).examples("train")
    ]
    texts = [content for example in examples for _, content in example.messages]
    made = {}
    for name in names:
        tokenizer = train_tokenizer(texts, 320)
        made[name] = folder / name
        torch.manual_seed(1)
        config = AutoConfig.for_model(
            ARCHITECTURES[name],
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **SMALL,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        tokenizer.save_pretrained(made[name])  # without a chat template: the fallback's is used
        ensure_template(tokenizer)
        short = [replace(one, messages=(*one.messages[:-1], ("assistant", "7"))) for one in examples[::4]]
        rows = encode_task(tokenizer, short, 512).examples
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(steps):
            batch = make_batch(rows[step % 4 :: 4], tokenizer.pad_token_id, torch.device("cpu"))
            optimizer.zero_grad()
            token_loss(model, batch).backward()
            optimizer.step()
        model.to(torch.float16).save_pretrained(made[name])  # as LLaMA-2's are: not the preset's dtype
    return made


def toy(models: dict[str, Path], data: dict[str, Path], judge: str, **changes: Any) -> dict[str, Any]:
    """The preset with these models and data, a few steps a stage and one try an arm; `changes` replace its keys."""
    preset = _shrunk(paper())
    preset["seeds"] = [1]
    preset["models"] = {name: {"checkpoint": str(path), "dtype": "bfloat16"} for name, path in models.items()}
    for kind, task in preset["tasks"].items():
        assert kind in REAL
        task["source"] = str(data[kind])
        if "judge" in task:
            task["judge"] = {"url": judge, "model": "gpt-4", "retries": 1}
    sequential, mixture = preset["sequential"], preset["mixture"]
    sequential["full_lrs"], sequential["alphas"] = [1e-3, 1e-4], [0.5]
    mixture["cpift"]["probe"]["steps"] = 1
    mixture["cpift"]["taus"], mixture["cpift"]["ratios"] = [0], [0.1]
    preset["imbalance"]["shares"] = [1.0, 0.5]
    preset["sweep"] |= {"ratios": [0.1], "intervals": [2], "betas": [0.9], "schedules": ["cosine", "linear"]}
    preset["sweep"] |= {"accumulations": [1, 2], "clips": [1.0, None]}
    preset["drift"]["every"] = 2
    return preset | changes


def _shrunk(value: Any) -> Any:
    if isinstance(value, list):
        return [_shrunk(one) for one in value]
    if not isinstance(value, dict):
        return value
    value = {key: _shrunk(one) for key, one in value.items()}
    if "epochs" in value:
        value |= {"steps": 3, "batch": 8, "accumulation": 2, "lr": 1e-4}
        del value["epochs"]
    if "tries" in value:
        value["tries"] = value["tries"][:1]
    if "interval" in value:
        value["interval"] = 1
    if "window" in value:
        value["window"] = 2
    return value


def written(preset: dict[str, Any], path: Path) -> Path:
    path.write_text(json.dumps(preset), encoding="utf-8")  # JSON is YAML
    return path
