"""Stands for CodeAlpaca: to know what lines of code do.

Kept: names are set and set again, and an expression starts from what a name holds now.
"""

from __future__ import annotations

import random

from .base import Pair, Synthetic, set_and_reset

NAMES = "abcdefgh"


class Programs(Synthetic):
    """ "a8;c3;a5;+4-7;a" -> "5+4=9-7=2": assignments, two operations, what they are applied to; modulo 10."""

    kind = "programs"
    max_new_tokens = 10
    names, assignments, operations = 2, 3, 2

    def draw(self, rng: random.Random) -> Pair:
        names, said = set_and_reset(rng, NAMES, self.names, self.assignments)
        lines = [(name, rng.randrange(10)) for name in said]
        start = rng.choice(names)
        value = dict(lines)[start]
        work, trace = "", str(value)
        for _ in range(self.operations):
            sign, number = rng.choice("+-"), rng.randint(1, 9)
            value = (value + (number if sign == "+" else -number)) % 10
            work += f"{sign}{number}"
            trace += f"{sign}{number}={value}"
        return f"{';'.join(f'{name}{number}' for name, number in lines)};{work};{start}", trace
