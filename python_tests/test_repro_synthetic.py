"""The synthetic tasks, and the characters they are written in."""

from __future__ import annotations

import re

import pytest

from epi_kernels.finetune.chat import IGNORE
from epi_kernels.repro.characters import ALPHABET, END, UNKNOWN, make_tokenizer, pretraining_text
from epi_kernels.repro.config import JudgeSpec, TaskSpec
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.evaluate import encode_task
from epi_kernels.repro.tasks import SYNTHETIC, make_task
from epi_kernels.repro.tasks.synthetic.snippets import NUMBERS
from epi_kernels.repro.tasks.synthetic.topics import COMMON_WORDS, WORDS_OF

KINDS = sorted(SYNTHETIC)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module", params=KINDS)
def task(request):
    return make_task(TaskSpec(kind=request.param), seed=3)


def pairs(examples):
    return [(one.messages[0][1], one.messages[1][1]) for one in examples]


# ---------------------------------------------------------------- the tasks


def sums(prompt):
    a, b = map(int, prompt[:-1].split("+"))
    carry = (a % 10 + b % 10) // 10
    return f"{a % 10 + b % 10:02d};{a // 10 + b // 10 + carry:02d}#{a + b:03d}"


def programs(prompt):
    *lines, work, start = prompt.split(";")
    value = {line[0]: int(line[1]) for line in lines}[start]
    trace = str(value)
    for step in re.findall("[+-][0-9]", work):
        value = (value + int(step)) % 10
        trace += f"{step}={value}"
    return trace


def deductions(prompt):
    statements, rank = prompt[:-1].split(":")
    below = dict(one.split(">") for one in statements.split(","))
    (place,) = below.keys() - below.values()
    chain = place
    while place in below:
        place = below[place]
        chain += place
    return f"{chain}#{chain[int(rank) - 1]}"


def strings(prompt):
    name, text = prompt[:3], prompt[4:-1]
    results = {"rev": "".join(reversed(text)), "upp": text.upper(), "dup": 2 * text, "las": text[-1]}
    return results.get(name) or "".join(sorted(text))


def dialogues(prompt):
    turns, asked = prompt.split(" ?")
    last = {turn[0]: turn for turn in turns.split()}
    return " ".join(last[slot] for slot in asked)


def topics(prompt):
    words = prompt[:-1].split()
    (topic,) = {name for name, own in WORDS_OF.items() for word in words if word in own}
    assert sum(word in COMMON_WORDS for word in words) == 2
    return topic


def entailment(prompt):
    facts, asked = prompt.split(";?")
    signs = dict(zip(facts[::2], facts[1::2]))
    return {"+": "yes", "-": "no", None: "maybe"}[signs.get(asked)]


def spans(prompt):
    words = prompt[:-1].split()
    names = {"p": [], "l": [], "": []}
    for before, name in zip(words[::2], words[1::2]):
        names[{"by": "p", "mr": "p", "at": "l", "in": "l", "so": "", "an": ""}[before]].append(name)
    return ",".join(" ".join([one, *names[one]]) for one in "pl" if names[one])


def snippets(prompt):
    """Not the text but its value: the answer is run."""
    name, *steps = re.findall("[a-z]+", prompt)
    value = 17
    for verb, number in zip(steps[::2], steps[1::2]):
        n = NUMBERS.index(number) + 2
        value = {"add": value + n, "less": value - n, "times": value * n}[verb]
    return name, value


def test_every_answer_is_the_one_its_prompt_asks_for(task):
    solve = globals()[task.kind]
    for prompt, answer in pairs(task.examples("test")):
        if task.kind == "snippets":
            name, value = solve(prompt)
            assert eval(answer, {name: 17}) == value
        else:
            assert solve(prompt) == answer


def test_brackets_only_where_the_order_needs_them():
    for _, answer in pairs(make_task(TaskSpec(kind="snippets")).examples("test")):
        bare = re.sub("[()]", "", answer)
        name = re.search("[a-z]", answer).group()
        assert (bare == answer) or eval(bare, {name: 17}) != eval(answer, {name: 17})


@pytest.mark.parametrize("kind, labels", [("topics", "A B C D"), ("entailment", "yes no maybe")])
def test_labels_are_about_equally_frequent(kind, labels):
    labels, task = labels.split(), make_task(TaskSpec(kind=kind))
    for split, least in (("test", 0.7 / len(labels)), ("train", 0.75 / len(labels))):
        answers = [answer for _, answer in pairs(task.examples(split))]
        assert set(answers) == set(labels)
        assert min(answers.count(label) for label in labels) > least * len(answers)


def test_sizes_splits_and_determinism(task):
    train, test = task.examples("train"), task.examples("test")
    assert (len(train), len(test)) == (4000, 200)
    prompts = [prompt for prompt, _ in pairs(train + test)]
    assert len(set(prompts)) == 4200
    again = make_task(TaskSpec(kind=task.kind), seed=3)
    assert (again.examples("train"), again.examples("test")) == (train, test)
    other = make_task(TaskSpec(kind=task.kind), seed=4)
    assert pairs(other.examples("test")) != pairs(test)
    assert (task.exact, task.full_mark, task.metric) == (True, 100.0, "exact match, %")


def test_a_share_is_cut_from_the_training_set_alone(task):
    part = make_task(TaskSpec(kind=task.kind, share=0.1), seed=3)
    cut, train = part.examples("train"), task.examples("train")
    assert len(cut) == 400
    assert [one for one in train if one in set(cut)] == cut  # some of the same, in the same order
    assert cut != train[:400]
    assert part.examples("test") == task.examples("test")
    assert len(make_task(TaskSpec(kind=task.kind, train=3, share=0.01)).examples("train")) == 1


def test_the_test_set_does_not_depend_on_the_size_of_the_training_set():
    small = make_task(TaskSpec(kind="strings", train=10, test=50), seed=3)
    assert len(small.examples("train")) == 10
    assert small.examples("test") == make_task(TaskSpec(kind="strings"), seed=3).examples("test")[:50]


def test_scores_reach_from_0_to_100(task):
    examples = task.examples("test")
    answers = [answer for _, answer in pairs(examples)]
    assert task.score(answers, examples) == 100.0
    assert task.score([answer + " " for answer in answers], examples) == 0.0
    assert task.score([*answers[:50], *[""] * 150], examples) == 25.0
    with pytest.raises(ValueError):
        task.score(answers[1:], examples)


def test_what_a_synthetic_task_cannot_have_is_refused():
    with pytest.raises(ReproError, match="sums is made here: leave out source"):
        make_task(TaskSpec(kind="sums", source="here"))
    with pytest.raises(ReproError, match="leave out judge"):
        make_task(TaskSpec(kind="sums", judge=JudgeSpec(url="http://x/v1", model="m")))
    with pytest.raises(ReproError, match="sums has about 8100 different prompts: ask for fewer"):
        make_task(TaskSpec(kind="sums", train=8000, test=101)).examples("train")
    with pytest.raises(ReproError, match="no kind of task is called 'nonsense'"):
        make_task(TaskSpec(kind="nonsense"))


# ---------------------------------------------------------------- characters


def test_the_alphabet(tokenizer):
    assert len(set(ALPHABET)) == len(ALPHABET) <= 64
    assert all(character.isprintable() for character in ALPHABET)
    assert len(tokenizer) == len(ALPHABET) + 3 == 64
    assert tokenizer.decode(tokenizer(ALPHABET, add_special_tokens=False)["input_ids"]) == ALPHABET
    assert tokenizer.tokenize("a\nß") == ["a", UNKNOWN, UNKNOWN]


def test_the_tokenizer_saves_and_loads(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "rev b4d= 7" + END
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)


def test_examples_survive_the_tokenizer(task, tokenizer):
    examples = task.examples("test")
    encoding = encode_task(tokenizer, examples, 64)
    assert (encoding.counts.examples, encoding.counts.truncated, encoding.counts.dropped) == (200, 0, 0)
    longest = 0
    for row, (prompt, answer) in zip(encoding.examples, pairs(examples)):
        asked = [token for token in row.labels if token != IGNORE]
        assert tokenizer.decode(row.input_ids) == prompt + answer + END
        assert tokenizer.decode(asked) == answer + END
        assert len(row.input_ids) == len(prompt + answer) + 1 <= 40
        longest = max(longest, len(asked))
    assert longest == task.max_new_tokens


def test_pretraining_text(task):
    text = pretraining_text(1, 300, 40)
    assert text == pretraining_text(1, 300, 40) != pretraining_text(2, 300, 40)
    assert {len(line) for line in text} == {40}
    assert set("".join(text)) <= set(ALPHABET)
    joined = "\n".join(text)
    assert not any(prompt in joined for prompt, _ in pairs(task.examples("train")))
