"""Stands for Alpaca: instructions of several kinds, each to be carried out on the text that follows.

Kept: the instruction comes first and alone decides what is done. Five kinds: reverse, upper case, duplicate, sort, last.
"""

from __future__ import annotations

import random
import string

from .base import Pair, Synthetic

SYMBOLS = "abcdefgh" + string.digits  # digits too: sums and instructions then compete for the same weights
OPERATIONS = {
    "rev": lambda text: text[::-1],
    "upp": str.upper,
    "dup": lambda text: text + text,
    "srt": lambda text: "".join(sorted(text)),
    "las": lambda text: text[-1],
}


class Strings(Synthetic):
    """ "rev b4d=" -> "d4b"."""

    kind = "strings"
    max_new_tokens = 9
    symbols = 4

    def draw(self, rng: random.Random) -> Pair:
        name = rng.choice(list(OPERATIONS))
        text = "".join(rng.choices(SYMBOLS, k=self.symbols))
        return f"{name} {text}=", OPERATIONS[name](text)
