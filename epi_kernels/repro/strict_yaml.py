"""YAML in which a mapping has every key once."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.composer import ComposerError


class _Loader(yaml.SafeLoader):
    """YAML's own keeps the last of two equal keys without a word: an arm of a preset would be gone."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ComposerError(None, None, f"{key.value!r} stands there twice", key.start_mark)
            seen.add(key.value)
        return node


def read_yaml(text: bytes) -> Any:
    """Plain values of a document. Raises yaml.YAMLError, for an equal key too."""
    return yaml.load(text, _Loader)
