"""Stands for UltraChat: several turns, and an answer that depends on what was said before and changed since.

Kept: later turns overwrite earlier ones. It has a phase transition (nothing for long, then all at once), which
a base model that has learned to copy is past.
"""

from __future__ import annotations

import random
import string

from .base import Pair, Synthetic, set_and_reset

SLOTS = "uvwxyz"
VALUES = string.ascii_lowercase[:10] + string.digits


class Dialogues(Synthetic):
    """ "xa4 ub9 x0c w77 ?ux" -> "ub9 x0c": what each slot asked for was last set to."""

    kind = "dialogues"
    max_new_tokens = 8
    turns, slots, asked = 4, 3, 2

    def draw(self, rng: random.Random) -> Pair:
        slots, said = set_and_reset(rng, SLOTS, self.slots, self.turns)
        turns = [(slot, "".join(rng.choices(VALUES, k=2))) for slot in said]
        last, asked = dict(turns), rng.sample(slots, self.asked)
        prompt = " ".join(slot + value for slot, value in turns)
        return f"{prompt} ?{''.join(asked)}", " ".join(slot + last[slot] for slot in asked)
