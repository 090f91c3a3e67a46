"""What the synthetic tasks share: distinct prompts by seed, a disjoint test set, exact match."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from epi_kernels.finetune.data import Example, sample
from epi_kernels.repro import lm_eval
from epi_kernels.repro.config import TaskSpec
from epi_kernels.repro.errors import ReproError

Pair = tuple[str, str]  # prompt, answer

DRAWS_WITHOUT_NEWS = (
    10_000  # then a kind has no more prompts: of one in a thousand left, 1 - 5e-5 would be found
)


def set_and_reset(rng: random.Random, alphabet: str, count: int, times: int) -> tuple[list[str], list[str]]:
    """`count` names, and the order in which they are set: each at least once, what is left of `times` sets one again."""
    names = rng.sample(alphabet, count)
    order = names + rng.choices(names, k=times - count)
    rng.shuffle(order)
    return names, order


class Synthetic:
    """A kind draws one prompt with its answer in ``draw``; everything else is here (``tasks.base.Task``)."""

    kind: str
    metric = "exact match, %"
    full_mark = 100.0
    exact = True
    max_new_tokens: int  # of the longest answer, and one for the end
    train, test = 4000, 200  # where the spec says nothing

    def __init__(self, spec: TaskSpec, seed: int = 0) -> None:
        for field in ("source", "judge"):
            if getattr(spec, field) is not None:
                raise ReproError(f"{self.kind} is made here: leave out {field}")
        if spec.harness == "lm-eval":
            lm_eval.entry_of(self.kind)
        self.spec, self.seed = spec, seed

    def draw(self, rng: random.Random) -> Pair:
        """One prompt and its answer, both of `characters.ALPHABET`."""
        raise NotImplementedError

    def example(self, prompt: str, answer: str, where: str) -> Example:
        return Example((("user", prompt), ("assistant", answer)), where, raw=True)

    @cached_property
    def _pairs(self) -> dict[str, list[Example]]:
        """The test set is drawn first: it stays the same whatever the size of the training set."""
        rng = random.Random(f"epi-kernels {self.kind} {self.seed}")
        seen: set[str] = set()
        splits: dict[str, list[Example]] = {}
        for split, count in (
            ("test", self.spec.test or self.test),
            ("train", self.spec.train or self.train),
        ):
            splits[split] = []
            idle = 0
            while len(splits[split]) < count:
                prompt, answer = self.draw(rng)
                idle += 1
                if prompt not in seen:
                    idle = 0
                    seen.add(prompt)
                    where = f"{self.kind}, {split}:{len(splits[split]) + 1}"
                    splits[split].append(self.example(prompt, answer, where))
                elif idle == DRAWS_WITHOUT_NEWS:
                    raise ReproError(
                        f"{self.kind} has about {len(seen)} different prompts: ask for fewer examples in train and test"
                    )
        return splits

    def examples(self, split: Literal["train", "test"]) -> list[Example]:
        found = self._pairs[split]
        if split == "test" or self.spec.share == 1:
            return list(found)
        return sample(found, max(1, round(self.spec.share * len(found))), self.seed)

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> float:
        right = sum(
            answer == example.messages[-1][1] for answer, example in zip(answers, examples, strict=True)
        )
        return 100.0 * right / max(1, len(examples))
