"""Markdown that programs write: tables, and blocks of a README that are generated between markers.

<!-- TOOL:begin NAME -->
anything here is replaced by what the maker of NAME returns; without a NAME by the maker of ""
<!-- TOOL:end NAME -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """``align``: one of l, r a column."""
    rule = ["---:" if side == "r" else "---" for side in align.ljust(len(header), "l")]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def escape(text: str) -> str:
    """Plain text for a cell or a line: nothing in it is taken for markup, and it stays on one line."""
    marks = re.sub(r"([\\|*<`~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)
    return " ".join(marks.split())


def rewrite_blocks(text: str, tool: str, makers: Mapping[str, Callable[[], str]]) -> str:
    """The text with every block of the tool written anew. ValueError: a name without a maker, a begin without its end."""
    pattern = re.compile(
        rf"(?P<begin><!-- {tool}:begin(?: (?P<name>[\w-]+))? -->\n)(?P<body>.*?)"
        rf"(?P<end><!-- {tool}:end(?(name) (?P=name)) -->)",
        re.DOTALL,
    )

    def block(match: re.Match[str]) -> str:
        name = match["name"] or ""
        if name not in makers:
            raise ValueError(f"README marks a block {name!r}; there are {', '.join(filter(None, makers))}")
        return f"{match['begin']}{makers[name]().strip()}\n{match['end']}"

    if len(pattern.findall(text)) != text.count(f"<!-- {tool}:begin "):
        raise ValueError(f"a {tool}:begin marker in the README lacks its {tool}:end")
    return pattern.sub(block, text)
