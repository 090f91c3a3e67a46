"""Stands for code generation (MBPP): an expression written from a description in words.

Kept: words become symbols, with the brackets that the order of the two steps needs.
"""

from __future__ import annotations

import random

from .base import Pair, Synthetic

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
VERBS = {"add": "{0}+{1}", "less": "{0}-{1}", "times": "{0}*{1}"}
NAMES = "abcdefgh"


class Snippets(Synthetic):
    """ "k add three, times two:" -> "(k+3)*2"."""

    kind = "snippets"
    max_new_tokens = 8

    def draw(self, rng: random.Random) -> Pair:
        name = rng.choice(NAMES)
        steps = [(rng.choice(list(VERBS)), rng.randrange(len(NUMBERS))) for _ in range(2)]
        (verb, number), (then, last) = steps
        inner = VERBS[verb].format(name, number + 2)
        # Brackets only where the second operation would otherwise bind first.
        if verb != "times" and then == "times":
            inner = f"({inner})"
        text = ", ".join(f"{verb} {NUMBERS[number]}" for verb, number in steps)
        return f"{name} {text}:", VERBS[then].format(inner, last + 2)
