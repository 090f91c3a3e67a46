"""Tiny files in the original formats of the papers' nine data sets, made by code: n training examples of each."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

from python_tests.tiny_model import write_jsonl

NAMES = ("Ada", "Alan", "Grace", "Kurt", "Emmy", "Paul")
PLACES = ("London", "Paris", "Rome", "Oslo")
TOPIC_WORDS = ("treaty", "goal", "shares", "chip")  # of AG News' classes 1 to 4


def size_of_test(n: int) -> int:
    """Test examples where the format has a test file."""
    return max(2, n // 4)


def gsm8k(folder: Path, n: int) -> None:
    def record(i: int) -> dict:
        a, b = 3 + i, 1000 + 7 * i
        answer = f"{NAMES[i % 6]} has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b:,}"
        return {
            "question": f"{NAMES[i % 6]} has {a} apples and buys {b} more. How many apples are there?",
            "answer": answer,
        }

    write_jsonl(folder / "train.jsonl", [record(i) for i in range(n)])
    write_jsonl(folder / "test.jsonl", [record(n + i) for i in range(size_of_test(n))])


def codealpaca(folder: Path, n: int) -> None:
    records = [
        {
            "instruction": f"Write a function that adds {i} to a number.",
            "input": f"x = {i}" if i % 3 == 0 else "",
            "output": f"def add_{i}(x):\n    y = x + {i}\n    return y",
        }
        for i in range(n)
    ]
    (folder / "code_alpaca_20k.json").write_text(json.dumps(records, indent=4))


def logiqa(folder: Path, n: int) -> None:
    def block(i: int) -> str:
        right = i % 4
        options = [
            f"{letter}.{NAMES[(i + place - right) % 6]} is first." for place, letter in enumerate("ABCD")
        ]
        context = f"{NAMES[i % 6]} is before {NAMES[(i + 1) % 6]} in row {i}."
        return "\n".join(["", "abcd"[right], context, "Who is first?", *options])

    (folder / "Train.txt").write_text("\n".join(block(i) for i in range(n)) + "\n")
    (folder / "Test.txt").write_text("\n".join(block(n + i) for i in range(size_of_test(n))) + "\n")


def alpaca(folder: Path, n: int) -> None:
    records = [
        {
            "instruction": "Write the word backwards." if i % 2 else f"Name the number after {i}.",
            "input": f"word{i}" if i % 2 else "",
            "output": f"word{i}"[::-1] if i % 2 else f"The number after {i} is {i + 1}.",
        }
        for i in range(n)
    ]
    (folder / "alpaca_data.json").write_text(json.dumps(records, indent=4))


def ultrachat(folder: Path, n: int) -> None:
    for part in range(2):
        write_jsonl(
            folder / f"train_{part}.jsonl",
            [
                {
                    "id": str(i),
                    "data": [
                        f"I am {NAMES[i % 6]} and I have {i} cats.",
                        f"Hello {NAMES[i % 6]}.",
                        "How many cats do I have?",
                        f"You have {i} cats.",
                    ],
                }
                for i in range(part, n, 2)
            ],
        )


def classification(folder: Path, n: int) -> None:
    for name, first, count in (("train", 0, n), ("test", n, size_of_test(n))):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            for i in range(first, first + count):
                word = TOPIC_WORDS[i % 4]
                writer.writerow([i % 4 + 1, f'A "{word}" in {PLACES[i % 3]}', f"News {i}, about a {word}."])


def nli(folder: Path, n: int) -> None:
    def record(i: int) -> dict:
        name, place = NAMES[i % 6], PLACES[i % 4]
        label = ("entailment", "neutral", "contradiction")[i % 3]
        hypothesis = (f"{name} is outdoors.", f"{name} is happy.", f"{name} sleeps at home.")[i % 3]
        return {
            "gold_label": label,
            "sentence1": f"{name} walks through {place} on day {i}.",
            "sentence2": hypothesis,
            "annotator_labels": [label],
        }

    unlabelled = {**record(0), "gold_label": "-"}
    write_jsonl(folder / "snli_1.0_train.jsonl", [unlabelled, *(record(i) for i in range(n))])
    write_jsonl(folder / "snli_1.0_test.jsonl", [record(n + i) for i in range(size_of_test(n))])


def ner(folder: Path, n: int) -> None:
    def sentence(i: int) -> str:
        rows = [(NAMES[i % 6], "NNP", "I-NP", "I-PER"), (f"Smith{i}", "NNP", "I-NP", "I-PER")]
        rows += [
            ("visits", "VBZ", "I-VP", "O"),
            (PLACES[i % 4], "NNP", "I-NP", "I-LOC"),
            (".", ".", "O", "O"),
        ]
        return "\n".join(" ".join(row) for row in rows)

    head = "-DOCSTART- -X- O O\n\n"
    (folder / "eng.train").write_text(head + "\n\n".join(sentence(i) for i in range(n)) + "\n\n")
    (folder / "eng.testb").write_text(
        head + "\n\n".join(sentence(n + i) for i in range(size_of_test(n))) + "\n"
    )


def mbpp(folder: Path, n: int) -> None:
    def record(task_id: int) -> dict:
        k = task_id % 97
        return {
            "text": f"Write a function to multiply a number by {k}.",
            "code": f"def times(x):\r\n  return x * {k}",
            "task_id": task_id,
            "test_setup_code": "",
            "test_list": [f"assert times(2) == {2 * k}", f"assert times(0) == {0 * k}"],
            "challenge_test_list": [],
        }

    numbers = [
        *range(1, 11),
        *range(11, 11 + size_of_test(n)),
        *range(511, 514),
        *range(601, 601 + min(n, 374)),
    ]
    write_jsonl(folder / "mbpp.jsonl", [record(number) for number in numbers])


WRITERS: dict[str, Callable[[Path, int], None]] = {
    one.__name__: one
    for one in (gsm8k, codealpaca, logiqa, alpaca, ultrachat, classification, nli, ner, mbpp)
}


def write_all(folder: Path, n: int = 24) -> dict[str, Path]:
    """kind -> the folder that is its `source`."""
    folders = {}
    for kind, write in WRITERS.items():
        folders[kind] = folder / kind
        folders[kind].mkdir(parents=True)
        write(folders[kind], n)
    return folders
