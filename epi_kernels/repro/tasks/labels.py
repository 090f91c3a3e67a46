"""Text classification (AG News, arXiv 1509.01626) and inference (SNLI, arXiv 1508.05326; MultiNLI, arXiv 1704.05426)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from epi_kernels.finetune.data import Example, LineError

from .reading import Dropped, Hub, Record, csv_records, json_records, pick, pick_text
from .real import RealTask, conversation

TOPICS = ("World", "Sports", "Business", "Sci/Tech")
RELATIONS = ("entailment", "neutral", "contradiction")  # the hub's 0, 1, 2


class Labelled(RealTask):
    """The answer is the label's name alone."""

    metric = "accuracy, %"
    exact = True
    max_new_tokens = 12

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> float:
        pairs = zip(answers, examples, strict=True)
        return 100 * sum(a.strip().lower() == e.messages[-1][1].lower() for a, e in pairs) / len(examples)


class Classification(Labelled):
    """AG News: the topic of a news item, one of four."""

    kind = "classification"
    hub = Hub("fancyzhx/ag_news")
    train_files = ("train.csv", "train.jsonl")
    test_files = ("test.csv", "test.jsonl")
    expects = 'train.csv and test.csv: class 1 to 4, title, description; or .jsonl: {"label": 0 to 3, "text": "..."}'

    def read(self, path: Path) -> Iterator[Record]:
        if path.suffix.lower() == ".csv":
            return csv_records(path, ("class", "title", "description"))
        return json_records(path)

    def parse(self, record: Any, where: str) -> Example:
        if isinstance(record, dict) and "class" in record:
            value, first = record["class"], 1
            text = pick_text(record, "title") + "\n" + pick_text(record, "description", allow_empty=True)
        else:
            value, first = pick(record, "label"), 0
            text = pick_text(record, "text")
        place = int(value) - first if str(value).strip().isdecimal() else -1
        if not 0 <= place < len(TOPICS):
            raise LineError(f"the class is {value!r}, not {first} to {first + 3}")
        prompt = f"Which topic is this news item about: {', '.join(TOPICS[:-1])} or {TOPICS[-1]}?\n\n{text.strip()}"
        return conversation(prompt, TOPICS[place], where)


class Nli(Labelled):
    """Does the premise entail the hypothesis? Items without a gold label ('-') are dropped, as is usual.

    MultiNLI's own test labels are not public: its matched development set is the test split.
    """

    kind = "nli"
    hub = Hub("stanfordnlp/snli")
    train_files = ("snli_1.0_train.jsonl", "multinli_1.0_train.jsonl", "train.jsonl")
    test_files = ("snli_1.0_test.jsonl", "multinli_1.0_dev_matched.jsonl", "test.jsonl")
    expects = 'snli_1.0_train.jsonl and snli_1.0_test.jsonl (or MultiNLI\'s), one object a line: {"gold_label": "neutral", "sentence1": "...", "sentence2": "..."}'

    def parse(self, record: Any, where: str) -> Example:
        label = pick(record, "gold_label", "label")
        if label in ("-", -1):
            raise Dropped("no gold label")
        if label in (0, 1, 2):
            label = RELATIONS[label]
        if label not in RELATIONS:
            raise LineError(f"the label is {label!r}, not one of {', '.join(RELATIONS)} or -")
        # SNLI holds a few hypotheses that are empty or "n/a"; they are kept, as they have labels.
        premise = pick_text(record, "sentence1", "premise", allow_empty=True)
        hypothesis = pick_text(record, "sentence2", "hypothesis", allow_empty=True)
        prompt = (
            f"Premise: {premise}\nHypothesis: {hypothesis}\n\n"
            "How does the premise stand to the hypothesis: entailment, neutral or contradiction?"
        )
        return conversation(prompt, label, where)
