"""Stands for named entity recognition: which stretches of a sentence name a person, which a place.

Kept: the word before a name tells its type (a name itself tells nothing), and a sentence may lack a type. The answer
lists the names by type, as a generating model is asked to.
"""

from __future__ import annotations

import random

from .base import Pair, Synthetic
from .words import CONSONANTS, VOWELS

BEFORE = {"p": ("by", "mr"), "l": ("at", "in"), "": ("so", "an")}  # person, place (location), neither


class Spans(Synthetic):
    """ "so tak by mel at gov" -> "p mel,l gov"."""

    kind = "spans"
    max_new_tokens = 16
    words = 3

    def draw(self, rng: random.Random) -> Pair:
        types = [rng.choice(("p", "l")), *rng.choices(list(BEFORE), k=self.words - 1)]
        rng.shuffle(types)
        text, found = [], {"p": [], "l": [], "": []}
        for type_ in types:
            name = rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(CONSONANTS)
            text += [rng.choice(BEFORE[type_]), name]
            found[type_].append(name)
        return " ".join(text) + ":", ",".join(f"{one} {' '.join(found[one])}" for one in "pl" if found[one])
