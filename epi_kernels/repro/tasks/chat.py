"""Alpaca and UltraChat (arXiv 2305.14233): open answers, rated by a judge or compared with the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from epi_kernels.finetune.data import Example, LineError, parse
from epi_kernels.repro.config import TaskSpec

from .judge import Judge
from .reading import Dropped, Hub, pick
from .real import RealTask, instruction, without_answer
from .rouge import rouge_l


class Judged(RealTask):
    """With `spec.judge` the mean rating, 1 to 10. Without it a stand-in by another name: overlap with the reference.

    ``kept``: the file of ratings; None is one a judge in the user's cache folder.
    """

    judged = True
    full_mark = 10
    max_new_tokens = 512

    def __init__(self, spec: TaskSpec, seed: int = 0):
        self.metric = (
            "judge's rating, 1-10" if spec.judge else "word overlap (ROUGE-L F1), 0-10; not a judge's score"
        )
        self.kept: Path | None = None
        super().__init__(spec, seed)

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> float:
        """Raises ReproError when the judge stays down; what is rated by then is kept."""
        if self.spec.judge is not None:
            return sum(Judge(self.spec.judge, self.kept).rate(answers, examples)) / len(examples)
        overlaps = [
            rouge_l(answer, one.messages[-1][1]) for answer, one in zip(answers, examples, strict=True)
        ]
        return 10 * sum(overlaps) / len(examples)


class Alpaca(Judged):
    """52,000 instructions; a share is held out for the test."""

    kind = "alpaca"
    hub = Hub("tatsu-lab/alpaca", test=None)
    train_files = ("alpaca_data*.json", "train.json", "train.jsonl")
    test_files = ("test.json", "test.jsonl")
    test_required = False
    expects = 'alpaca_data.json, an array of {"instruction": "...", "input": "...", "output": "..."}'

    def parse(self, record: Any, where: str) -> Example:
        return instruction(record, where)


class UltraChat(Judged):
    """Dialogues of several turns; the last answer is what is rated. A last turn of the user's is left off."""

    kind = "ultrachat"
    hub = Hub("HuggingFaceH4/ultrachat_200k", "train_sft", "test_sft")
    train_files = ("train_*.jsonl", "train.jsonl", "ultrachat*.jsonl")
    test_files = ("test_*.jsonl", "test.jsonl")
    test_required = False
    expects = 'train_0.jsonl ..., one object a line: {"id": "...", "data": ["a user\'s turn", "the answer", ...]}, or {"messages": [...]}'

    def parse(self, record: Any, where: str) -> Example:
        if isinstance(record, dict) and "messages" in record:
            return parse({"messages": record["messages"]}, where)
        turns = pick(record, "data")
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise LineError('"data" must be a list of strings')
        turns = turns[: len(turns) // 2 * 2]
        if not turns:
            raise Dropped("a question without an answer")
        without_answer(turns[-1])
        roles = ("user", "assistant")
        return Example(tuple((roles[place % 2], turn) for place, turn in enumerate(turns)), where)
