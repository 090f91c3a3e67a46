"""`epi-kernels finetune` on a tiny model: the inputs, the arguments, and how tests read what it wrote."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from epi_kernels.finetune import log
from python_tests.tiny_model import backend, qa, save_tiny, write_config, write_jsonl

# short and cheap
FAST = ["--max-length", 64, "--batch-size", 2, "--lr", 3e-3, "--quiet", "--backend", backend()]


def write_inputs(folder: Path) -> Path:
    """New and old data, a config and a checkpoint."""
    write_jsonl(folder / "qa.jsonl", qa(24))
    write_jsonl(folder / "old.jsonl", [{"instruction": f"Say {n}", "output": f"{n}!"} for n in range(6)])
    write_config(folder)
    save_tiny(folder / "model")
    return folder


def arguments(files, out, *more, model="model"):
    return ["--model", files / model, "--data", files / "qa.jsonl", "--out", out, *FAST, *more]


def events(directory, kind):
    return [event for event in log.read(directory / "log.jsonl") if event["event"] == kind]


def weights(directory):
    return load_file(directory / "model.safetensors")


def same_weights(one, other):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)
