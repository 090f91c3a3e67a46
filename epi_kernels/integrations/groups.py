"""From a model to an optimizer's groups of (name, parameter) pairs, and from a name to its layer."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable, Iterator
from typing import Any

import torch

# What torch.compile, activation checkpointing and FSDP put into the names of the modules they wrap.
_WRAPPERS = re.compile(r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_DDP, _PEFT = "module.", "base_model.model."
_BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.\d+(?=\.)")
# transformers.Trainer's patterns, for lower-cased names
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")

Patterns = str | Iterable[str]


def transformer_block(name: str) -> Hashable:
    """The transformer block a parameter belongs to, for ``layer_key``; a parameter outside of blocks is alone.

        MaskedEMAAdamW(named_parameter_groups(model), layer_key=transformer_block)

    "model.layers.3.mlp.up_proj.weight" (Llama, Mistral, Qwen, Gemma) gives "model.layers.3",
    "transformer.h.3.attn.bias" (GPT-2) "transformer.h.3", "layers.3.attention.dense.weight" (GPT-NeoX) "layers.3".
    What DDP, FSDP, torch.compile, activation checkpointing and PEFT put before or between makes no difference to blocks.
    """
    bare = _WRAPPERS.sub("", name).removeprefix(_DDP).removeprefix(_PEFT)
    found = _BLOCK.search(bare)
    return bare[: found.end()] if found else name


def named_parameter_groups(
    model: torch.nn.Module,
    *,
    weight_decay: float = 0.01,
    isolate: Patterns | None = None,
    no_isolate: Patterns | None = None,
    decaying: Collection[str] | None = None,
    include_frozen: bool = False,
) -> list[dict[str, Any]]:
    """Groups of (name, parameter) pairs for MaskedEMAAdamW or torch.optim.AdamW.

    Biases and norms have no weight decay, by the rule of ``transformers.Trainer``. Tied parameters come once, empty
    groups not at all. Names are as without DDP, FSDP, torch.compile and activation checkpointing, so that a wrapper
    changes neither what is carried over by name nor random numbers.

    Args:
        model: its parameters' order is kept within a group.
        weight_decay: of the groups that have any.
        isolate: regular expressions, searched for (``re.search``) in every name a parameter has; parameters that
            match none go into groups with ``isolate=False``, never selected. None: all take part.
        no_isolate: regular expressions of parameters that take no part, whatever ``isolate`` says.
        decaying: names with weight decay, in place of the rule.
        include_frozen: parameters that do not require a gradient too. They count among the eligible elements.

    Raises:
        ValueError: a pattern that matches no parameter; it would isolate something else than was meant.
    """
    taken = [(names, param) for names, param in _parameters(model) if include_frozen or param.requires_grad]
    strip_ddp = all(names[0].startswith(_DDP) for names, _ in taken)
    wanted, unwanted = _compiled(isolate), _compiled(no_isolate)
    unmatched = {pattern.pattern for pattern in [*wanted, *unwanted]}
    plain = _without_decay(model) if decaying is None else None
    groups: dict[tuple[bool, bool], list] = {}
    for names, param in taken:
        bare = [_WRAPPERS.sub("", name) for name in names]
        bare = [name.removeprefix(_DDP) if strip_ddp else name for name in bare]
        hits = {pattern.pattern for pattern in [*wanted, *unwanted] if any(map(pattern.search, bare))}
        unmatched -= hits
        takes_part = isolate is None or any(pattern.pattern in hits for pattern in wanted)
        takes_part = takes_part and not any(pattern.pattern in hits for pattern in unwanted)
        decays = names[0] in decaying if decaying is not None else names[0] not in (plain or ())
        groups.setdefault((takes_part, decays), []).append((bare[0], param))
    if unmatched:
        raise ValueError(
            f"no parameter's name matches {', '.join(map(repr, sorted(unmatched)))}; they are regular expressions, "
            "searched for in names such as those of model.named_parameters()"
        )
    made = []
    for takes_part, decays in ((True, True), (True, False), (False, True), (False, False)):
        pairs = groups.get((takes_part, decays))
        if pairs:
            group = {"params": pairs, "weight_decay": weight_decay if decays else 0.0}
            made.append(group if takes_part else {**group, "isolate": False})
    return made


def parameter_names(model: torch.nn.Module) -> dict[torch.nn.Parameter, str]:
    """Every parameter's first name, as ``named_parameter_groups`` gives it: without wrappers."""
    found = [(names[0], param) for names, param in _parameters(model)]
    strip_ddp = all(name.startswith(_DDP) for name, _ in found)
    return {param: _WRAPPERS.sub("", name.removeprefix(_DDP) if strip_ddp else name) for name, param in found}


def _compiled(patterns: Patterns | None) -> list[re.Pattern[str]]:
    given = [] if patterns is None else [patterns] if isinstance(patterns, str) else patterns
    return [re.compile(pattern) for pattern in given]


def _own_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Parameter]]:
    """(name, the module that holds it, parameter), in named_parameters' order, tied ones under every name."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, param in module._parameters.items():
            if param is not None:
                yield f"{prefix}.{key}" if prefix else key, module, param


def _parameters(model: torch.nn.Module) -> list[tuple[list[str], torch.nn.Parameter]]:
    """(names, parameter): each parameter once, its first name first."""
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, _, param in _own_parameters(model):
        names.setdefault(param, []).append(name)
    return [(given, param) for param, given in names.items()]


def _without_decay(model: torch.nn.Module) -> set[str]:
    """Names of biases and norms: LayerNorms by type, other norms by name."""
    return {
        name
        for name, module, _ in _own_parameters(model)
        if isinstance(module, torch.nn.LayerNorm) or _NO_DECAY.search(name.lower())
    }
