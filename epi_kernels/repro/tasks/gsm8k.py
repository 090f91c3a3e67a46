"""GSM8K (arXiv 2110.14168): grade-school word problems, scored by the number after ####."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from epi_kernels.finetune.data import Example, LineError

from .reading import Hub, pick_text
from .real import RealTask, conversation

MARKED = re.compile(r"####\s*(-?\s*[$€£]?\s*-?[0-9.,]*[0-9][0-9.,]*)")


def number(text: str) -> Decimal | None:
    """The number after the first ####: commas, a currency sign and a trailing dot mean nothing; None without one."""
    found = MARKED.search(text)
    if found is None:
        return None
    try:
        return Decimal(re.sub(r"[$€£,\s]", "", found[1]).rstrip("."))
    except InvalidOperation:  # 1.2.3
        return None


class Gsm8k(RealTask):
    """Answers are generated, reasoning included. Numbers are compared as numbers: 5.0 is 5."""

    kind = "gsm8k"
    metric = "exact match, %"
    max_new_tokens = 320
    hub = Hub("openai/gsm8k", config="main")
    train_files = ("train.jsonl",)
    test_files = ("test.jsonl",)
    expects = 'train.jsonl and test.jsonl, one object a line: {"question": "...", "answer": "... #### 42"}'

    def parse(self, record: Any, where: str) -> Example:
        question, answer = pick_text(record, "question"), pick_text(record, "answer")
        if number(answer) is None:
            raise LineError('"answer" has no number after ####')
        return conversation(question, answer, where)

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> float:
        right = sum(
            number(answer) is not None and number(answer) == number(example.messages[-1][1])
            for answer, example in zip(answers, examples, strict=True)
        )
        return 100 * right / len(examples)
