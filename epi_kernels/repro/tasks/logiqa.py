"""LogiQA (arXiv 2007.08124): a text, a question, four options, one of them right."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from epi_kernels.finetune.data import Example, LineError

from .reading import Hub, Record, block_records, pick, pick_text
from .real import RealTask, conversation

LETTERS = "ABCD"
BLOCK = ("answer", "context", "question", "A", "B", "C", "D")
PREFIX = re.compile(r"^\(?[A-Da-d]\s*[.):]\s*")  # options come with their letter in some releases


def letter(value: Any) -> str:
    """'b', 'B', 1 or '1' -> 'B'. Raises LineError."""
    text = str(value).strip().upper()
    if len(text) == 1 and text in LETTERS:
        return text
    if text in ("0", "1", "2", "3"):
        return LETTERS[int(text)]
    raise LineError(f"the answer is {value!r}, neither a letter a to d nor a number 0 to 3")


class LogiQA(RealTask):
    """The answer is the letter alone. Reads the original blocks of eight lines, JSON lines of LogiQA 2.0 and AGIEval."""

    kind = "logiqa"
    metric = "accuracy, %"
    exact = True
    max_new_tokens = 4
    hub = Hub("lucasmccabe/logiqa", revision="refs/convert/parquet")
    train_files = ("train.txt", "train.jsonl")
    test_files = ("test.txt", "test.jsonl")
    expects = (
        "Train.txt and Test.txt, blocks of a blank line, the answer's letter, context, question and four options, "
        'or .jsonl, one object a line: {"context": "...", "question": "...", "options": ["...", ...], "answer": "a"}'
    )

    def read(self, path: Path) -> Iterator[Record]:
        return block_records(path, BLOCK)

    def parse(self, record: Any, where: str) -> Example:
        if isinstance(record, dict) and set(LETTERS) <= record.keys():
            options = [record[one] for one in LETTERS]
        else:
            options = pick(record, "options")
        if (
            not isinstance(options, list)
            or len(options) != 4
            or not all(isinstance(one, str) for one in options)
        ):
            raise LineError('"options" must be four strings')
        context = pick_text(record, "context", "text", "passage", allow_empty=True)
        question = pick_text(record, "question", "query")
        right = letter(pick(record, "answer", "correct_option", "label"))
        lines = [f"{one}. {PREFIX.sub('', option.strip())}" for one, option in zip(LETTERS, options)]
        prompt = (
            f"{context}\n\n{question}\n"
            + "\n".join(lines)
            + "\n\nAnswer with the letter of the right option."
        )
        return conversation(prompt.strip(), right, where)

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> float:
        right = 0
        for answer, example in zip(answers, examples, strict=True):
            found = re.search(r"\b[A-D]\b", answer)
            right += found is not None and found[0] == example.messages[-1][1]
        return 100 * right / len(examples)
