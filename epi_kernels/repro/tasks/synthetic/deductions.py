"""Stands for LogiQA: a conclusion that follows from statements given in any order.

Kept: no statement alone holds the answer, and the order of the statements says nothing.
"""

from __future__ import annotations

import random
import string

from .base import Pair, Synthetic


class Deductions(Synthetic):
    """ "c>a,d>c:3=" -> "dca#a": the chain, then who is third."""

    kind = "deductions"
    max_new_tokens = 6
    links = 2

    def draw(self, rng: random.Random) -> Pair:
        chain = rng.sample(string.ascii_lowercase, self.links + 1)
        statements = [f"{left}>{right}" for left, right in zip(chain, chain[1:])]
        rng.shuffle(statements)
        rank = rng.randint(1, len(chain))
        return f"{','.join(statements)}:{rank}=", f"{''.join(chain)}#{chain[rank - 1]}"
