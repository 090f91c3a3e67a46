"""Made-up words, the same in every run: a task's vocabulary is part of the task, its examples are the seed's."""

from __future__ import annotations

import random

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def made_up(purpose: str, count: int) -> list[str]:
    """`count` different words of three letters (consonant, vowel, consonant) in an order of their own."""
    words = [first + vowel + last for first in CONSONANTS for vowel in VOWELS for last in CONSONANTS]
    return random.Random(f"epi-kernels words {purpose}").sample(words, count)
