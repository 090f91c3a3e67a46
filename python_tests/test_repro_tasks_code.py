"""CodeBLEU and ROUGE-L. Figures of the packages codebleu 0.7.0 and rouge-score 0.1.2 stand where ours must equal them."""

from __future__ import annotations

import ast
import random

import pytest

from epi_kernels.finetune.data import Example
from epi_kernels.repro.config import TaskSpec
from epi_kernels.repro.tasks import make_task
from epi_kernels.repro.tasks.code import code_of
from epi_kernels.repro.tasks.codebleu import codebleu
from epi_kernels.repro.tasks.dataflow import flow
from epi_kernels.repro.tasks.rouge import common_length, rouge_l

CASES = {  # reference, answer, n-gram, weighted n-gram, syntax and data-flow match of codebleu 0.7.0
    "the package's example": (
        "def add ( a , b ) :\n return a + b",
        "def sum ( first , second ) :\n return second + first",
        0.10419044640136393,
        0.11094660471566163,
        1.0,
        1.0,
    ),
    "a line less": (
        "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / len(values)",
        "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total",
        0.8668778997501817,
        0.8761560783209453,
        0.5,
        0.8888888888888888,
    ),
    "another way": (
        "def largest(items):\n    best = items[0]\n    for item in items:\n        if item > best:\n            best = item\n    return best",
        "def largest(items):\n    best = items[0]\n    for i in range(len(items)):\n        if items[i] > best:\n            best = items[i]\n    return best",
        0.45046627229833414,
        0.4665221056209486,
        0.3333333333333333,
        0.7272727272727273,
    ),
    "nothing alike": (
        "import os\nnames = os.listdir(path)\nfor name in names:\n    print(name)",
        "class Point:\n    def __init__(self, x):\n        self.x = x",
        0.02163211878762423,
        0.01732952646684803,
        0.07692307692307693,
        0.2222222222222222,
    ),
    "a short one": (
        "while n > 1:\n    n = n // 2\n    count = count + 1",
        "n = n // 2",
        0.16529888822158656,
        0.24965936660557547,
        0.6,
        0.14285714285714285,
    ),
}
CORPUS = (0.4143309893204367, 0.4226875708912698, 0.43103448275862066, 0.575)


@pytest.mark.parametrize("name", CASES)
def test_codebleu_against_the_released_script(name):
    reference, answer, ngram, weighted, syntax, dataflow = CASES[name]
    ours = codebleu([answer], [reference])
    assert ours.ngram == pytest.approx(ngram, abs=1e-12)
    assert ours.weighted_ngram == pytest.approx(weighted, abs=1e-12)
    # Trees of another parser, a handful of them; the script's own flow match changes with the hash seed.
    assert ours.syntax == pytest.approx(syntax, abs=0.15)
    assert ours.dataflow == pytest.approx(dataflow, abs=0.15)
    assert ours.score == pytest.approx(25 * (ours.ngram + ours.weighted_ngram + ours.syntax + ours.dataflow))


def test_codebleu_of_a_corpus():
    references, answers = zip(*((case[0], case[1]) for case in CASES.values()))
    ours = codebleu(answers, references)
    ngram, weighted, syntax, dataflow = CORPUS
    assert ours.ngram == pytest.approx(ngram, abs=1e-12)
    assert ours.weighted_ngram == pytest.approx(weighted, abs=1e-12)
    assert ours.syntax == pytest.approx(syntax, abs=0.05)
    assert ours.dataflow == pytest.approx(dataflow, abs=0.05)
    assert ours.python == len(CASES)


def test_ends_of_the_scale():
    code = "def f(a, b):\n    c = a + b\n    return c"
    same = codebleu([code], [code])
    assert (same.score, same.syntax, same.dataflow) == (100, 1, 1)
    nothing = codebleu([""], [code])
    assert (nothing.score, nothing.ngram, nothing.syntax, nothing.dataflow) == (0, 0, 0, 0)
    assert codebleu(["", ""], ["", ""]).score == 0


def test_only_its_shape_and_flow_survive_another_naming():
    reference = "def f(a, b):\n    c = a + b\n    return c"
    renamed = codebleu(["def g(x, y):\n    z = x + y\n    return z"], [reference])
    assert (renamed.syntax, renamed.dataflow) == (1, 1) and renamed.ngram < 0.5
    swapped = codebleu(["def f(a, b):\n    c = a + b\n    return a"], [reference])
    assert swapped.syntax == 1 and 0 < swapped.dataflow < 1


def test_what_does_not_parse():
    reference = "def f(a):\n    b = a + 1\n    return b"
    cut = codebleu(["def f(a):\n    b = a + 1\n    return (b"], [reference])
    assert 0 < cut.syntax < 1 and 0 < cut.dataflow < 1
    # Not Python: words alone are compared, and the other parts have nothing to say.
    query = codebleu(["SELECT name FROM users ;"], ["SELECT name FROM users WHERE age > 3 ;"])
    assert (query.syntax, query.dataflow, query.python) == (None, None, 0)
    assert query.score == pytest.approx(50 * (query.ngram + query.weighted_ngram))
    query = "SELECT name FROM users WHERE age > 3 ;"
    mixed = codebleu([reference, query], [reference, query])
    assert (mixed.score, mixed.python) == (100, 1)
    for odd in (
        "\0",
        "(" * 3000,
        "x = '\\d'",
    ):  # null bytes, deep nesting, an odd escape: no exception, no warning
        codebleu([odd], [reference])


def test_docstrings_and_comments_are_no_syntax():
    bare = "def f(a):\n    return a"
    told = codebleu(['def f(a):\n    """What f does."""\n    # a comment\n    return a'], [bare])
    assert told.syntax == told.dataflow == 1


FLOWS = {
    "a = 1\nb = a": [
        ("var_1", "computedFrom", ("var_0",)),
        ("var_0", "comesFrom", ()),
        ("var_2", "computedFrom", ("var_1",)),
        ("var_1", "comesFrom", ("var_1",)),
    ],
    "print('hello')": [],  # nothing flows
    # Both branches' values reach the last line.
    "if p:\n    a = q\nelse:\n    a = r\nprint(a)": [
        ("var_1", "computedFrom", ("var_0",)),
        ("var_0", "comesFrom", ()),
        ("var_1", "computedFrom", ("var_2",)),
        ("var_2", "comesFrom", ()),
        ("var_1", "comesFrom", ("var_1",)),
    ],
    # A loop's second turn sees what the first one made.
    "for i in n:\n    s = t\n    t = i": [
        ("var_1", "computedFrom", ("var_0",)),
        ("var_0", "comesFrom", ("var_0",)),
        ("var_3", "computedFrom", ("var_2",)),
        ("var_2", "comesFrom", ("var_2",)),
        ("var_2", "computedFrom", ("var_1",)),
        ("var_1", "comesFrom", ("var_1",)),
    ],
    "x, y = y, x": [
        ("var_1", "computedFrom", ("var_0",)),
        ("var_0", "computedFrom", ("var_1",)),
        ("var_0", "comesFrom", ()),
        ("var_1", "comesFrom", ()),
    ],
}


@pytest.mark.parametrize("code", FLOWS)
def test_data_flow(code):
    assert flow(ast.parse(code)) == FLOWS[code]


def test_code_inside_an_answer():
    assert code_of("Here it is:\n```python\nx = 1\n```\nDone.\n```\ny\n```") == "x = 1"
    assert code_of("```\nx = 1") == "x = 1"
    assert code_of("  x = 1\n") == "x = 1"
    examples = [Example((("user", "q"), ("assistant", "x = y + 1")), "f:1")]
    one = make_task(TaskSpec(kind="mbpp", source="/nowhere"))
    assert one.metric == "CodeBLEU" and one.score(["Sure!\n```python\nx = y + 1\n```"], examples) > 80


def longest(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_common_subsequence_equals_the_table():
    rng = random.Random(3)
    for _ in range(200):
        a, b = ([rng.choice("abcd") for _ in range(rng.randrange(0, 70))] for _ in range(2))
        assert common_length(a, b) == longest(a, b)


@pytest.mark.parametrize(
    "answer, reference, f1",
    [
        ("The cat sat on the mat.", "A cat lay on the big mat", 0.6153846153846154),
        ("it's x_y 12", "It s x y 1", 0.8),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("Ünï çode", "ünï çode", 1.0),  # rouge-score drops what is not ASCII
    ],
)
def test_rouge_l(answer, reference, f1):
    assert rouge_l(answer, reference) == pytest.approx(f1, abs=1e-12)
