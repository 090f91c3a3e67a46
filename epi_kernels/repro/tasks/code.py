"""CodeAlpaca and MBPP (arXiv 2108.07732), scored by CodeBLEU: generated code is never run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from epi_kernels.finetune.data import Example, LineError

from .codebleu import codebleu
from .reading import Hub, Record, pick, pick_text
from .real import RealTask, conversation, instruction

FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


def code_of(answer: str) -> str:
    """The first fenced block of an answer, else all of it."""
    found = FENCE.search(answer)
    return (found[1] if found else answer).strip()


class Code(RealTask):
    """Corpus-level CodeBLEU with four equal weights: see `codebleu`."""

    metric = "CodeBLEU"
    max_new_tokens = 384

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> float:
        references = [code_of(example.messages[-1][1]) for example in examples]
        return codebleu([code_of(answer) for answer in answers], references).score


class CodeAlpaca(Code):
    """20,000 instructions; without a test split of its own, so that a share is held out. A part of it is not Python."""

    kind = "codealpaca"
    hub = Hub("sahil2801/CodeAlpaca-20k", test=None)
    train_files = ("code_alpaca_20k.json", "code_alpaca*.json", "train.json", "train.jsonl")
    test_files = ("test.json", "test.jsonl")
    test_required = False
    expects = 'code_alpaca_20k.json, an array of {"instruction": "...", "input": "...", "output": "..."}'

    def parse(self, record: Any, where: str) -> Example:
        return instruction(record, where)


class Mbpp(Code):
    """Python problems with their tests. The paper runs the tests; running what a model writes is unsafe, so it is CodeBLEU
    here. The splits are the paper's, by task_id."""

    kind = "mbpp"
    hub = Hub("google-research-datasets/mbpp", config="full")
    train_files = ("mbpp.jsonl", "sanitized-mbpp.json")
    test_required = False
    expects = 'mbpp.jsonl, one object a line: {"task_id": 601 to 974 (training) or 11 to 510 (test), "text": "...", "code": "...", "test_list": ["...", ...]}'

    def parse(self, record: Any, where: str) -> Example:
        text, code, tests = (
            pick_text(record, "text", "prompt"),
            pick_text(record, "code"),
            pick(record, "test_list"),
        )
        if not isinstance(tests, list) or not all(isinstance(one, str) for one in tests):
            raise LineError('"test_list" must be a list of strings')
        prompt = f"{text.strip()}\nThe code must pass these tests:\n\n" + "\n".join(tests)
        return conversation(prompt, code.replace("\r\n", "\n").strip(), where)

    def _of_folder(self, folder: Path) -> tuple[Iterator[Record], Iterator[Record]]:
        train, test = [], []
        for place, record in super()._of_folder(folder)[0]:
            given: Any = 0
            try:
                given = pick(record, "task_id") if not isinstance(record, LineError) else 0
                number = int(given)
            except LineError as error:
                record, number = error, 0
            except (TypeError, ValueError):
                record, number = LineError(f'"task_id" is {given!r}, not a whole number'), 0
            if not number or 601 <= number <= 974:  # what is wrong is named with the training examples
                train.append((place, record))
            elif 11 <= number <= 510:
                test.append((place, record))
        return iter(train), iter(test)
