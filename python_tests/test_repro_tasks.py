"""The real tasks, read from tiny files in the original formats."""

from __future__ import annotations

import json

import pytest

from epi_kernels.finetune.chat import encode, ensure_template
from epi_kernels.repro.config import TaskSpec
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.tasks import REAL, make_task
from python_tests.paper_fixtures import WRITERS, size_of_test, write_all
from python_tests.tiny_model import tiny_tokenizer, write_jsonl

N = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("papers"), N)


def task(kind, folder, **spec):
    return make_task(TaskSpec(kind=kind, source=str(folder), **spec))


def answers(examples):
    return [one.messages[-1][1] for one in examples]


def test_fixtures_cover_every_real_kind():
    assert list(WRITERS) == list(REAL)


@pytest.mark.parametrize("kind", REAL)
def test_reads_its_original_format(kind, folders):
    one = task(kind, folders[kind])
    train, test = one.examples("train"), one.examples("test")
    held_out = kind in ("codealpaca", "alpaca", "ultrachat")
    assert len(train) == (N - 1 if held_out else N)
    assert len(test) == (1 if held_out else size_of_test(N))
    assert not {example.key for example in train} & {example.key for example in test}
    for example in train + test:
        assert example.messages[-1][0] == "assistant" and not example.raw
        assert str(folders[kind]) in example.where
    assert one.kind == kind and one.full_mark in (10, 100)
    assert one.score(answers(test), test) == pytest.approx(one.full_mark)
    if kind != "ner":
        assert one.score([""] * len(test), test) == 0
    # A second task, with another seed, has the same examples.
    again = make_task(TaskSpec(kind=kind, source=str(folders[kind])), seed=5)
    assert (again.examples("train"), again.examples("test")) == (train, test)


PROMPTS = {
    "codealpaca": (("user", "Write a function that adds 0 to a number.\n\nx = 0"),),
    "logiqa": (
        (
            "user",
            "Ada is before Alan in row 0.\n\nWho is first?\nA. Ada is first.\nB. Alan is first.\n"
            "C. Grace is first.\nD. Kurt is first.\n\nAnswer with the letter of the right option.",
        ),
        ("assistant", "A"),
    ),
    "classification": (
        (
            "user",
            'Which topic is this news item about: World, Sports, Business or Sci/Tech?\n\nA "treaty" in London\n'
            "News 0, about a treaty.",
        ),
        ("assistant", "World"),
    ),
    "ner": (
        (
            "user",
            "Name the persons (PER), organisations (ORG), places (LOC) and other names (MISC) in this sentence."
            "\n\nAda Smith0 visits London .",
        ),
        ("assistant", "PER: Ada Smith0; LOC: London"),
    ),
    "mbpp": (
        (
            "user",
            "Write a function to multiply a number by 19.\nThe code must pass these tests:\n\n"
            "assert times(2) == 38\nassert times(0) == 0",
        ),
        ("assistant", "def times(x):\n  return x * 19"),
    ),
    "ultrachat": (("user", "I am Ada and I have 0 cats."), ("assistant", "Hello Ada.")),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_conversation(kind, folders):
    one = task(kind, folders[kind])
    found = [
        example.messages[: len(PROMPTS[kind])] for example in one.examples("train") + one.examples("test")
    ]
    assert PROMPTS[kind] in found


def test_every_kind_becomes_tokens(folders):
    tokenizer = tiny_tokenizer()
    ensure_template(tokenizer)
    for kind in REAL:
        one = task(kind, folders[kind])
        encoding = encode(tokenizer, one.examples("train") + one.examples("test"), 2048)
        assert (encoding.counts.dropped, encoding.counts.truncated, encoding.counts.unlearned_turns) == (
            0,
            0,
            0,
        )


def test_counts_and_shares_choose_a_part(folders):
    whole = task("gsm8k", folders["gsm8k"]).examples("train")
    part = task("gsm8k", folders["gsm8k"], train=10, test=3, share=0.5)
    assert len(part.examples("train")) == 5 and len(part.examples("test")) == 3
    assert set(part.examples("train")) <= set(whole)


def test_what_is_left_out_is_counted(tmp_path):
    write_all(tmp_path, 6)
    one = task("nli", tmp_path / "nli")
    one.examples("train")
    assert one.dropped == {"train": {"no gold label": 1}, "test": {}}
    path = tmp_path / "alpaca" / "alpaca_data.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps([*records, {"instruction": "Say nothing.", "input": "", "output": ""}]))
    one = task("alpaca", tmp_path / "alpaca")
    one.examples("test")
    assert one.dropped == {"train": {"empty answer": 1}}
    copied = (tmp_path / "gsm8k" / "test.jsonl").read_text()
    with (tmp_path / "gsm8k" / "train.jsonl").open("a") as file:
        file.write(copied)
    one = task("gsm8k", tmp_path / "gsm8k")
    assert len(one.examples("train")) == 6
    assert one.dropped["train"] == {"also in the test split": 2}


def test_other_releases_of_the_same_data(tmp_path):
    question = {"options": ["x", "y", "z", "w"]}
    lines = {
        "2.0": {"text": "T", "question": "Q", "answer": 1, **question},
        "hub": {"context": "T", "query": "Q", "correct_option": "1", **question},
        "agieval": {
            "passage": "T",
            "question": "Q",
            "label": "B",
            "options": ["(A)x", "(B)y", "(C)z", "(D)w"],
        },
    }
    for name, line in lines.items():
        folder = tmp_path / name
        folder.mkdir()
        write_jsonl(folder / "train.txt", [line])
        write_jsonl(folder / "test.txt", [{**line, "question": "Other", "query": "Other"}])
        (only,) = task("logiqa", folder).examples("train")
        assert only.messages[1] == ("assistant", "B")
        assert "\nA. x\nB. y\nC. z\nD. w\n" in only.messages[0][1]
    folder = tmp_path / "mnli"
    folder.mkdir()
    pair = {"gold_label": "neutral", "sentence1": "a", "sentence2": "b"}
    write_jsonl(folder / "multinli_1.0_train.jsonl", [pair])
    write_jsonl(folder / "multinli_1.0_dev_matched.jsonl", [{**pair, "sentence2": "c"}])
    assert answers(task("nli", folder).examples("test")) == ["neutral"]


def broken(folder, name, change):
    path = folder / name
    path.write_text(change(path.read_text()))
    return path


WRONG = {
    "gsm8k": ("train.jsonl", lambda t: t.replace('"answer"', '"reply"', 1), ':1: has no "answer" (its fields: "question", "reply")'),
    "codealpaca": ("code_alpaca_20k.json", lambda t: t.replace('"instruction"', '"task"', 1), '[1]: has no "instruction"'),
    "logiqa": ("Train.txt", lambda t: t.replace("Who is first?\n", "", 1), ":2: is a block of 6 lines, not 7"),
    "alpaca": ("alpaca_data.json", lambda t: t.replace('"word1"', "7", 1), '[2]: "input" must be a string, is int'),
    "ultrachat": ("train_1.jsonl", lambda t: t.replace('"data"', '"turns"', 1), ':1: has no "data"'),
    "classification": ("test.csv", lambda t: t.replace('"1"', '"9"', 1), ":1: the class is '9', not 1 to 4"),
    "nli": ("snli_1.0_train.jsonl", lambda t: t.replace('"neutral"', '"maybe"', 1), ":3: the label is 'maybe'"),
    "ner": ("eng.train", lambda t: t.replace("I-LOC", "I-CITY", 1), ":3: the tag 'I-CITY' is none of"),
    "mbpp": ("mbpp.jsonl", lambda t: t.replace('"task_id"', '"number"', 1), ':1: has no "task_id"'),
}  # fmt: skip


ODD = {
    "classification": ("test.csv", lambda t: t.replace('"1"', '"²"', 1), ":1: the class is '²', not 1 to 4"),
    "mbpp": (
        "mbpp.jsonl",
        lambda t: t.replace("601", '"first"', 1),
        ":16: \"task_id\" is 'first', not a whole number",
    ),
}


@pytest.mark.parametrize(("kind", "wrong"), [*WRONG.items(), *ODD.items()])
def test_a_wrong_record_is_named(kind, wrong, tmp_path):
    write_all(tmp_path, 8)
    name, change, message = wrong
    path = broken(tmp_path / kind, name, change)
    with pytest.raises(ReproError) as error:
        task(kind, tmp_path / kind).examples("train")
    assert f"{path}{message}" in str(error.value)
    assert "expected: " in str(error.value)


def test_the_first_wrong_lines_are_shown_and_the_rest_counted(tmp_path):
    write_all(tmp_path, 12)
    path = broken(tmp_path / "gsm8k", "train.jsonl", lambda t: "{\n" + t.replace("####", "=="))
    with pytest.raises(ReproError) as error:
        task("gsm8k", tmp_path / "gsm8k").examples("test")
    text = str(error.value)
    assert f"{path}:1: is not JSON" in text and f'{path}:2: "answer" has no number after ####' in text
    assert "... and 8 more wrong lines" in text


@pytest.mark.parametrize("kind", REAL)
def test_missing_and_empty_files(kind, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ReproError, match=f"task {kind}: .*empty holds no .*; expected: "):
        task(kind, empty).examples("train")
    write_all(tmp_path / "all", 8)
    folder = tmp_path / "all" / kind
    for path in folder.iterdir():
        path.write_text("[]" if path.suffix == ".json" else "")
    with pytest.raises(ReproError, match=f"task {kind}: no train examples in "):
        task(kind, folder).examples("train")


def test_missing_test_file_and_broken_json(tmp_path):
    write_all(tmp_path, 8)
    (tmp_path / "gsm8k" / "test.jsonl").unlink()
    with pytest.raises(ReproError, match=r"holds no test\.jsonl; expected: train\.jsonl and test\.jsonl"):
        task("gsm8k", tmp_path / "gsm8k").examples("train")
    path = broken(tmp_path / "alpaca", "alpaca_data.json", lambda t: t[:-5])
    with pytest.raises(ReproError, match=r"alpaca_data\.json: is not JSON"):
        task("alpaca", tmp_path / "alpaca").examples("train")
    path.write_bytes(b"[\n\xff]")
    with pytest.raises(ReproError, match=r"alpaca_data\.json: is not UTF-8 \(byte 2\)"):
        task("alpaca", tmp_path / "alpaca").examples("train")
    path = tmp_path / "nli" / "snli_1.0_test.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\xff\n")
    with pytest.raises(ReproError, match=r"test\.jsonl:3: is not UTF-8 \(byte 0\)\nexpected"):
        task("nli", tmp_path / "nli").examples("train")


def test_settings_a_kind_cannot_serve(tmp_path):
    with pytest.raises(ReproError, match="task gsm8k: is not judged"):
        make_task(TaskSpec(kind="gsm8k", judge={"url": "http://x/v1", "model": "m"}))
    with pytest.raises(ReproError, match="no kind of task is called 'gsm9k'"):
        make_task(TaskSpec(kind="gsm9k"))
    with pytest.raises(ReproError, match=r"nothing is no folder; expected: train\.jsonl"):
        task("gsm8k", tmp_path / "nothing").examples("test")
