"""Stands for GSM8K: an answer worked out in steps, which counts when the last number is right.

Kept: the steps before the answer, and the mark "#" before the number. Here the steps count too.
"""

from __future__ import annotations

import random

from .base import Pair, Synthetic


class Sums(Synthetic):
    """ "47+38=" -> "15;08#085": units, tens with the carry, result."""

    kind = "sums"
    max_new_tokens = 10

    def draw(self, rng: random.Random) -> Pair:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        units = a % 10 + b % 10
        tens = a // 10 + b // 10 + units // 10
        return f"{a}+{b}=", f"{units:02d};{tens:02d}#{a + b:03d}"
