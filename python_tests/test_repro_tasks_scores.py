"""What the real tasks count as right."""

from __future__ import annotations

from collections import Counter

import pytest

from epi_kernels.finetune.data import Example
from epi_kernels.repro.config import TaskSpec
from epi_kernels.repro.tasks import make_task
from epi_kernels.repro.tasks.gsm8k import number
from epi_kernels.repro.tasks.ner import entities, read, write


def of(kind, *golds):
    """A task and examples with these answers; no file is read."""
    examples = [Example((("user", "q"), ("assistant", gold)), f"f:{i}") for i, gold in enumerate(golds, 1)]
    return make_task(TaskSpec(kind=kind, source="/nowhere")), examples


@pytest.mark.parametrize(
    "text, value",
    [
        ("so #### 1,234", "1234"),
        ("#### $18.50.", "18.5"),
        ("#### -3", "-3"),
        ("#### -$3", "-3"),
        ("####7\nand more #### 8", "7"),
        ("7", None),
        ("#### seven", None),
        ("#### 1.2.3", None),
    ],
)
def test_number_of_an_answer(text, value):
    assert (None if value is None else str(number(text).normalize())) == value


def test_gsm8k_scores_the_number_alone():
    one, examples = of("gsm8k", *["words\n#### 1,000"] * 4)
    assert one.score(["#### 1000", "other words #### $1000.00", "#### 100", "1000"], examples) == 50


def test_entities_in_both_conventions_and_as_text():
    tokens = ["U.N.", "official", "Ekeus", "Rolf", "Smith", "Baghdad", "Rome"]
    original = ["I-ORG", "O", "I-PER", "B-PER", "I-PER", "I-LOC", "B-LOC"]
    iob2 = ["B-ORG", "O", "B-PER", "B-PER", "I-PER", "B-LOC", "B-LOC"]
    found = entities(tokens, original)
    assert found == entities(tokens, iob2)
    assert found == [
        ("ORG", "U.N."),
        ("PER", "Ekeus"),
        ("PER", "Rolf Smith"),
        ("LOC", "Baghdad"),
        ("LOC", "Rome"),
    ]
    text = write(found)
    assert text == "PER: Ekeus | Rolf Smith; ORG: U.N.; LOC: Baghdad | Rome"
    assert read(text) == Counter(found)
    odd = entities(["A|B;C"], ["I-MISC"])  # the separators themselves
    assert read(write(odd)) == Counter(odd)
    assert write([]) == "none" and read("none") == Counter() and read("PER; :: | who") == Counter()


def test_entity_f1_counts_each_mention():
    one, examples = of("ner", "PER: Ada | Ada; LOC: Rome", "none")
    # 2 right of 4 named and 3 wanted
    assert one.score(["per: Ada; ORG: Rome; LOC: Rome", "LOC: Oslo"], examples) == pytest.approx(200 * 2 / 7)
    assert one.score(["", "none"], examples) == 0
    assert one.score(["none"], examples[1:]) == 100


def test_letters_and_labels_in_an_answer():
    one, examples = of("logiqa", "B", "A", "C")
    assert one.score(["The answer is B.", "Because", "C. Ada is first."], examples) == pytest.approx(200 / 3)
    one, examples = of("nli", "neutral", "entailment")
    assert one.score([" Neutral\n", "perhaps"], examples) == 50
    one, examples = of("classification", "Sci/Tech")
    assert one.score(["Sci/Tech"], examples) == 100
