"""Stands for text classification: which of four topics a text is about.

Kept: some words tell the topic, others are common to all, and the label is a word of its own.
"""

from __future__ import annotations

import random

from .base import Pair, Synthetic
from .words import made_up

TOPICS, WORDS, COMMON = 4, 10, 20
_WORDS = made_up("topics", TOPICS * WORDS + COMMON)
COMMON_WORDS = _WORDS[TOPICS * WORDS :]
WORDS_OF = {"ABCD"[topic]: _WORDS[topic * WORDS :][:WORDS] for topic in range(TOPICS)}


class Topics(Synthetic):
    """ "kel mot bur sav:" -> "C": two words of four are the topic's, the others are anybody's."""

    kind = "topics"
    max_new_tokens = 2

    def draw(self, rng: random.Random) -> Pair:
        topic = rng.choice(list(WORDS_OF))
        words = [*rng.sample(WORDS_OF[topic], 2), *rng.sample(COMMON_WORDS, 2)]
        rng.shuffle(words)
        return " ".join(words) + ":", topic
