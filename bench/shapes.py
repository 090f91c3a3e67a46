"""Parameter lists that GPU timings run over."""

from __future__ import annotations

import math

import torch

from epi_kernels.architectures import ARCHITECTURES

LLAMA_1B_CONFIG = ARCHITECTURES["Llama-3.2-1B"]  # a test compares the list with transformers' own model


def llama(config: dict) -> list[tuple[int, ...]]:
    """Shapes of a Llama's parameters, in the order of ``named_parameters``."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    key_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = [
        (hidden, hidden),
        (key_value, hidden),
        (key_value, hidden),
        (hidden, hidden),
        (inner, hidden),
        (inner, hidden),
        (hidden, inner),
        (hidden,),
        (hidden,),
    ]
    head = [] if config["tie_word_embeddings"] else [(config["vocab_size"], hidden)]
    return [(config["vocab_size"], hidden), *layer * config["num_hidden_layers"], (hidden,), *head]


def llama_1b() -> list[tuple[int, ...]]:
    """146 tensors, 1,235,814,400 elements."""
    return llama(LLAMA_1B_CONFIG)


def tiny_llama() -> list[tuple[int, ...]]:
    """The same list in small, for smoke runs."""
    small = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return llama({**LLAMA_1B_CONFIG, **small, "num_attention_heads": 4, "num_key_value_heads": 2})


def parameter_lists(elements: int) -> dict[str, list[tuple[int, ...]]]:
    """Of each architecture, as many whole decoder layers as ``elements`` hold, one at least; where the whole model
    fits, that."""
    from transformers import AutoConfig, AutoModelForCausalLM

    lists = {}
    for name in ("Llama-2-7B", "Llama-3-8B", "Mistral-7B", "Qwen2-7B", "Gemma-2-9B"):
        config = ARCHITECTURES[name]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        shapes = [tuple(param.shape) for param in model.parameters()]
        layers = [[tuple(param.shape) for param in layer.parameters()] for layer in model.model.layers]
        if sum(map(math.prod, shapes)) > elements:
            count = max(1, elements // sum(map(math.prod, layers[0])))
            shapes = [shape for layer in layers[:count] for shape in layer]
        lists[name] = shapes
    return lists
