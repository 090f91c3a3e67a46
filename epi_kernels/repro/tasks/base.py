"""What the harness asks of a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from epi_kernels.finetune.data import Example


class Task(Protocol):
    """Examples and a score. An Example's last message is the answer; `raw` ones go without a chat template.

    ``exact``: the score is the percentage of answers that equal the reference, so one forward pass decides it (greedy
    decoding and teacher forcing part only after a first mistake). Else answers are generated greedily, of at most
    ``max_new_tokens``, and given to ``score``.
    """

    kind: str  # the registry's name
    metric: str  # for the tables: "exact match, %"
    full_mark: float  # 100 or 10
    exact: bool
    max_new_tokens: int

    def examples(self, split: Literal["train", "test"]) -> list[Example]:
        """All of a split, as many as the spec asks for; the two splits are disjoint. Raises ReproError."""
        ...

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> float:
        """Mean over the examples, in the metric's unit."""
        ...
