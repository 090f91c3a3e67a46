"""Stands for natural language inference: whether a hypothesis follows from a premise, contradicts it, or neither.

Kept: three labels, and a hypothesis about something the premise may not speak of. The labels are drawn equally often,
but yes and no have fewer different prompts: of 4000 training examples they are 28 to 31 % each, of the test set about a third.
"""

from __future__ import annotations

import random
import string

from .base import Pair, Synthetic


class Entailment(Synthetic):
    """ "u+x-;?x" -> "no": what is so (+), what is not (-), and what is asked."""

    kind = "entailment"
    max_new_tokens = 6
    facts = 2

    def draw(self, rng: random.Random) -> Pair:
        *known, other = rng.sample(string.ascii_lowercase, self.facts + 1)
        answer = rng.choice(("yes", "no", "maybe"))
        asked = other if answer == "maybe" else rng.choice(known)
        facts = []
        for what in known:
            sign = rng.choice("+-") if what != asked else {"yes": "+", "no": "-"}[answer]
            facts.append(what + sign)
        return f"{''.join(facts)};?{asked}", answer
