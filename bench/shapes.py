"""Parameter lists that timings run over."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from epi_kernels.architectures import ARCHITECTURES

Shape = tuple[int, ...]
LLAMA_1B_CONFIG = ARCHITECTURES["Llama-3.2-1B"]  # a test compares the list with transformers' own model


def llama(config: dict) -> list[Shape]:
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


def llama_1b() -> list[Shape]:
    """146 tensors, 1,235,814,400 elements."""
    return llama(LLAMA_1B_CONFIG)


def tiny_llama() -> list[Shape]:
    """The same list in small, for smoke runs."""
    small = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return llama({**LLAMA_1B_CONFIG, **small, "num_attention_heads": 4, "num_key_value_heads": 2})


@dataclass(frozen=True)
class ParameterList:
    """Shapes to step over; of an architecture, how much of it they are."""

    shapes: list[Shape]
    of: Architecture | None = None
    layers: int = 0  # decoder layers among them
    ends: bool = False  # embedding, final norm and head are among them

    @property
    def elements(self) -> int:
        return elements_of(self.shapes)

    def facts(self) -> dict[str, Any]:
        """Of an architecture's list: what a record says of it."""
        if self.of is None:
            return {}
        whole = {"of_layers": len(self.of.layers), "of_elements": self.of.elements}
        return {"layers": self.layers, "ends": self.ends, **whole}


@dataclass(frozen=True)
class Architecture:
    """Shapes of a model's parameters in the order of ``parameters()``: the decoder's layers, and what is around them."""

    before: list[Shape]  # the embedding
    layers: list[list[Shape]]
    after: list[Shape]  # the final norm, and the head where it is not the embedding

    @property
    def elements(self) -> int:
        return elements_of([*self.before, *chain(*self.layers), *self.after])

    def fitting(self, elements: int) -> ParameterList:
        """Embedding, final norm, head and as many layers as ``elements`` hold; layers alone where the three and one
        layer are more than that, one at least."""
        each, ends = elements_of(self.layers[0]), elements_of([*self.before, *self.after])
        with_ends = ends + each <= elements
        count = min(max(1, (elements - ends * with_ends) // each), len(self.layers))
        shapes = list(chain(*self.layers[:count]))
        if with_ends:
            shapes = [*self.before, *shapes, *self.after]
        return ParameterList(shapes, self, count, with_ends)


def elements_of(shapes: Iterable[Shape]) -> int:
    return sum(map(math.prod, shapes))


def architectures() -> dict[str, Architecture]:
    """Of models of 7 to 9 billion parameters, built from their configs on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    found = {}
    for name in ("Llama-2-7B", "Llama-3-8B", "Mistral-7B", "Qwen2-7B", "Gemma-2-9B"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURES[name]))
        layers = [[tuple(param.shape) for param in layer.parameters()] for layer in model.model.layers]
        shapes = [tuple(param.shape) for param in model.parameters()]
        start = len(list(model.model.embed_tokens.parameters()))  # they come first, the layers next
        end = start + sum(map(len, layers))
        found[name] = Architecture(shapes[:start], layers, shapes[end:])
    return found
