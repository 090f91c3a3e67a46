"""ROUGE-L (Lin, 2004): the longest common subsequence of two texts' words."""

from __future__ import annotations

import re
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """Runs of letters and digits, lower case, unstemmed; the package rouge-score knows ASCII only."""
    return re.findall(r"[^\W_]+", text.lower())


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Of the longest common subsequence, a row of the table at a time as the bits of one integer (Hyyro, 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    everything = (1 << len(first)) - 1
    row = everything  # a zero bit: the length grows there
    for word in second:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(first) - bin(row).count("1")


def rouge_l(answer: str, reference: str) -> float:
    """F1, 0 to 1."""
    ours, theirs = words(answer), words(reference)
    if not ours or not theirs:
        return 0.0
    return 2 * common_length(ours, theirs) / (len(ours) + len(theirs))
