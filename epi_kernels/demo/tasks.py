"""The two tasks, made here, in one alphabet and padded on the right.

    A, sums:       "47+38="      -> "15;08;085."     units, tens with the carry, result
    B, strings:    "rev b4d="    -> "d4b."           rev, upp, dup, srt, las

While A is learned, half of each batch are other instructions (cpy, rot, swp, dbl, fst, mid) on such strings.
They stand for what a pre-trained model brings along: without them a model this small needs thousands of steps
for B. Training and evaluation prompts are disjoint. An answer counts when all of its characters are right.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PAD = "_"
ALPHABET = PAD + "+=;. " + string.digits + string.ascii_lowercase + string.ascii_uppercase
CODE = {character: index for index, character in enumerate(ALPHABET)}
IGNORED = -100  # label of a position that is not part of an answer, as in transformers
LENGTH = 15  # characters of the longest example, less its last: that one is only ever predicted

# Strings have a fixed length and share the digits with the sums: B then competes for the same weights.
SYMBOLS = "abcdefgh" + string.digits
STRING_LENGTH = 3

Operations = Mapping[str, Callable[[str], str]]
NEW: Operations = {
    "rev": lambda s: s[::-1],
    "upp": str.upper,
    "dup": lambda s: s + s,
    "srt": lambda s: "".join(sorted(s)),
    "las": lambda s: s[-1],
}
KNOWN: Operations = {
    "cpy": lambda s: s,
    "rot": lambda s: s[1:] + s[0],
    "swp": lambda s: s[1] + s[0] + s[2:],
    "dbl": lambda s: "".join(c + c for c in s),
    "fst": lambda s: s[0],
    "mid": lambda s: s[len(s) // 2],
}

Pair = tuple[str, str]  # prompt, answer


@dataclass(frozen=True)
class Examples:
    """Prompts with answers, encoded."""

    pairs: list[Pair]
    ids: Tensor  # [n, LENGTH] int64
    labels: Tensor  # [n, LENGTH] int64: the next character where it belongs to the answer, else IGNORED

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True)
class Tasks:
    """One seed's data. `learn_*` is trained on, `test_*` is scored; no prompt is in both."""

    learn_a: Examples
    known: Examples
    test_a: Examples
    learn_b: Examples
    test_b: Examples


def sum_with_steps(a: int, b: int) -> Pair:
    """One sum of two numbers below 100."""
    units = a % 10 + b % 10
    tens = a // 10 + b // 10 + units // 10
    return f"{a:02d}+{b:02d}=", f"{units:02d};{tens:02d};{a + b:03d}."


def instruction(name: str, text: str, operations: Operations) -> Pair:
    return f"{name} {text}=", operations[name](text) + "."


def all_sums(rng: random.Random, largest: int) -> list[Pair]:
    """Every sum of a number of two digits and one up to `largest`, shuffled."""
    pairs = [
        sum_with_steps(a, b) for a in range(10, 100) for b in range(10 if largest > 9 else 0, largest + 1)
    ]
    rng.shuffle(pairs)
    return pairs


def some_strings(rng: random.Random, count: int, operations: Operations) -> list[Pair]:
    """`count` different prompts, the operations in turn so that none is rare."""
    names = list(operations)
    found: dict[str, str] = {}
    while len(found) < count:
        text = "".join(rng.choices(SYMBOLS, k=STRING_LENGTH))
        prompt, answer = instruction(names[len(found) % len(names)], text, operations)
        found.setdefault(prompt, answer)
    return list(found.items())


def encode(pairs: list[Pair]) -> Examples:
    """Labels are shifted: position i is asked for character i + 1."""
    ids = torch.full((len(pairs), LENGTH), CODE[PAD])
    labels = torch.full((len(pairs), LENGTH), IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        codes = torch.tensor([CODE[character] for character in prompt + answer])
        first, last = len(prompt) - 1, len(codes) - 1
        ids[row, :last] = codes[:-1]
        labels[row, first:last] = codes[first + 1 :]
    return Examples(pairs, ids, labels)


def make_tasks(seed: int, learn: int = 4000, known: int = 4000, test: int = 200, largest: int = 99) -> Tasks:
    """The data of one seed, in prompts a part; `largest` bounds the sums' second number."""
    rng = random.Random(f"epi-kernels demo {seed}")
    sums = all_sums(rng, largest)
    if len(sums) < learn + test:
        raise ValueError(f"{len(sums)} sums are too few for {learn} + {test}")
    strings = some_strings(rng, learn + test, NEW)
    return Tasks(
        learn_a=encode(sums[:learn]),
        known=encode(some_strings(rng, known, KNOWN)),
        test_a=encode(sums[learn : learn + test]),
        learn_b=encode(strings[:learn]),
        test_b=encode(strings[learn:]),
    )


def joined(*parts: Examples) -> Examples:
    return Examples(
        [pair for part in parts for pair in part.pairs],
        torch.cat([part.ids for part in parts]),
        torch.cat([part.labels for part in parts]),
    )
