"""A parameter's name, whatever wrapper a model was in."""

from __future__ import annotations


def bare_name(name: str) -> str:
    """A parameter's name without the prefixes that DDP and torch.compile put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")
