"""A tiny Llama and a tiny tokenizer, made here: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def backend() -> str:
    """The CPU's fastest backend: "auto" might pick Triton's interpreter, which the test suite turns on."""
    from epi_kernels.backends import dispatch

    return "reference" if isinstance(dispatch.load("cpu"), str) else "cpu"


def write_config(folder: Path, **changes) -> Path:
    """A config file with `changes` over CONFIG."""
    path = folder / "config-tiny.json"
    path.write_text(json.dumps({**CONFIG, **changes}))
    return path


def qa(count: int, first: int = 0) -> list[dict]:
    """Questions with answers that can be learned."""
    return [
        {"prompt": f"What is {n} plus {n % 7}?", "completion": f"It is {n + n % 7}."}
        for n in range(first, first + count)
    ]


def write_jsonl(path: Path, records: Iterable[object]) -> Path:
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    return path


def tiny_tokenizer(texts: Sequence[str] = ("What is 1 plus 2? It is 3.",) * 4, vocab_size: int = 300):
    from epi_kernels.finetune.chat import train_tokenizer

    return train_tokenizer(texts, vocab_size)


def tiny_llama(seed: int = 0, dtype=None, **changes):
    """A model with random weights, in training mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    record = {**CONFIG, **changes}
    config = AutoConfig.for_model(record.pop("model_type"), **record)
    return AutoModelForCausalLM.from_config(config).to(dtype or torch.float32).train()


def steps(model, optimizer, count: int, first: int = 0) -> None:
    """Steps `first` to `first + count` of a run; each has a batch of its own."""
    import torch

    for i in range(first, first + count):
        ids = (torch.arange(48).view(4, 12) * (i + 1)) % 300
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def save_tiny(folder: Path, seed: int = 0, **changes) -> Path:
    """A checkpoint directory with model and tokenizer."""
    tiny_llama(seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def command(module, *arguments: object) -> int:
    """Runs a command module in this process; returns its exit status."""
    import argparse

    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([str(argument) for argument in arguments]))
