"""The real tasks read from the hub: a stand-in for the package `datasets`, and the package itself on local files."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from epi_kernels.repro.config import TaskSpec
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.tasks import REAL, make_task
from epi_kernels.repro.tasks.reading import Hub, hub_records
from python_tests.paper_fixtures import gsm8k, size_of_test

HUB_ROWS = {
    "logiqa": {"context": "c", "query": "q", "options": ["1", "2", "3", "4"], "correct_option": 3},
    "classification": {"text": "t", "label": 2},
    "nli": {"premise": "p", "hypothesis": "h", "label": 2},
    "ner": {"tokens": ["EU", "rejects", "German"], "ner_tags": [3, 0, 7], "pos_tags": [0, 0, 0]},
    "mbpp": {"task_id": 7, "text": "t", "code": "x = 1", "test_list": ["assert x"]},
    "gsm8k": {"question": "q", "answer": "#### 1"},
    "alpaca": {"instruction": "i", "input": "", "output": "o", "text": "all"},
    "codealpaca": {"instruction": "i", "input": "", "output": "x = 1"},
    "ultrachat": {
        "prompt": "hi",
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
    },
}
HUB_ANSWERS = {
    "logiqa": "D",
    "classification": "Business",
    "nli": "contradiction",
    "ner": "ORG: EU; MISC: German",
    "mbpp": "x = 1",
    "gsm8k": "#### 1",
    "alpaca": "o",
    "codealpaca": "x = 1",
    "ultrachat": "ho",
}


@pytest.mark.parametrize("kind", REAL)
def test_rows_of_the_hub(kind, monkeypatch):
    asked = []

    def load_dataset(name, config, split, revision):
        asked.append((name, split))
        texts = {"text", "question", "instruction", "query", "premise"} & HUB_ROWS[kind].keys()
        rows = [dict(HUB_ROWS[kind]) for _ in range(4)]
        for place, row in enumerate(rows):  # distinct ones
            for key in texts:
                row[key] = f"{row[key]} {split} {place}"
            if "messages" in row:
                row["messages"] = [{"role": "user", "content": f"{split} {place}"}, row["messages"][1]]
            if kind == "ner":
                row["tokens"] = [*row["tokens"][:1], f"{split}{place}", row["tokens"][2]]
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    one = make_task(TaskSpec(kind=kind))
    train, test = one.examples("train"), one.examples("test")
    assert {example.messages[-1][1] for example in train + test} == {HUB_ANSWERS[kind]}
    assert len(train) + len(test) == (4 if one.hub.test is None else 8)
    assert {name for name, _ in asked} == {one.hub.name}
    assert train[0].where.startswith(f"{one.hub.name}[{one.hub.train}]:")


def test_the_hub_is_out_of_reach(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nnow")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ReproError) as error:
        make_task(TaskSpec(kind="gsm8k")).examples("train")
    assert "openai/gsm8k (split train) could not be read" in str(error.value)
    assert "ConnectionError: Couldn't reach the Hub now" in str(error.value)
    assert "give `source`, a folder with train.jsonl and test.jsonl" in str(error.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ReproError, match="needs the package datasets"):
        make_task(TaskSpec(kind="gsm8k", source="someone/gsm8k")).examples("train")


def test_the_datasets_package_itself(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    gsm8k(folder, 8)
    rows = list(hub_records(Hub(str(folder)), "test", "gsm8k", "nothing"))
    assert len(rows) == size_of_test(8) and set(rows[0][1]) == {"question", "answer"}
    with pytest.raises(ReproError, match=r"\(split dev\) could not be read"):
        list(hub_records(Hub(str(folder)), "dev", "gsm8k", "nothing"))
