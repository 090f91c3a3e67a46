"""Tokens and labels: loss on the answers alone, whatever the template; truncation is counted."""

from __future__ import annotations

import pytest

from epi_kernels.finetune import chat
from epi_kernels.finetune.chat import END, IGNORE, encode
from epi_kernels.finetune.data import Example
from epi_kernels.finetune.errors import UserError
from python_tests.tiny_model import tiny_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Rewrites history, as templates of reasoning models do: earlier answers lose their first word.
FORGETFUL = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split(' ', 1)[-1] }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def with_template(tokenizer):
    def give(template):
        tokenizer.chat_template = template
        return tokenizer

    yield give
    tokenizer.chat_template = None


def example(*messages, raw=False):
    return Example(tuple(messages), "d.jsonl:1", raw)


QUESTION = example(("user", "What is 1 plus 2?"), ("assistant", "It is 3."))


def learned(tokenizer, encoded):
    return tokenizer.decode([label for label in encoded.labels if label != IGNORE])


@pytest.mark.parametrize("template", [chat.FALLBACK_TEMPLATE, CHATML], ids=["fallback", "chatml"])
def test_labels_are_the_answer_and_the_end_token(with_template, template):
    tokenizer = with_template(template)
    (one,) = encode(tokenizer, [QUESTION], 128).examples
    assert learned(tokenizer, one) == "It is 3." + END
    assert all(label in (IGNORE, token) for label, token in zip(one.labels, one.input_ids, strict=True))


@pytest.mark.parametrize("template", [chat.FALLBACK_TEMPLATE, CHATML], ids=["fallback", "chatml"])
def test_the_prompt_ends_where_generation_begins(with_template, template):
    tokenizer = with_template(template)
    (one,) = encode(tokenizer, [QUESTION], 128).examples
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 1 plus 2?"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert one.input_ids[: len(ids)] == ids
    assert one.labels[: len(ids)] == [IGNORE] * len(ids)
    assert one.labels[len(ids)] != IGNORE


def test_every_answer_of_a_conversation_is_learned(with_template):
    tokenizer = with_template(chat.FALLBACK_TEMPLATE)
    long = example(
        ("system", "Be short."), ("user", "a"), ("assistant", "bee"), ("user", "c"), ("assistant", "dee")
    )
    encoding = encode(tokenizer, [long], 128)
    assert learned(tokenizer, encoding.examples[0]) == f"bee{END}dee{END}"
    assert encoding.counts.unlearned_turns == 0


def test_answers_a_template_rewrites_are_counted_and_not_learned(with_template):
    tokenizer = with_template(FORGETFUL)
    long = example(("user", "a"), ("assistant", "think bee"), ("user", "c"), ("assistant", "think dee"))
    encoding = encode(tokenizer, [long], 128)
    assert learned(tokenizer, encoding.examples[0]) == f"think dee{END}"
    assert encoding.counts.unlearned_turns == 1


def test_unicode_answers_survive_byte_level_tokens(with_template):
    tokenizer = with_template(chat.FALLBACK_TEMPLATE)
    (one,) = encode(
        tokenizer, [example(("user", "質問🙂"), ("assistant", "Grüße 🙂 \u2028 é"))], 128
    ).examples
    assert learned(tokenizer, one) == "Grüße 🙂 \u2028 é" + END


def test_raw_joins_prompt_and_completion_as_they_stand(with_template):
    tokenizer = with_template(chat.FALLBACK_TEMPLATE)
    pair = example(("user", "2+2="), ("assistant", "4"), raw=True)
    (one,) = encode(tokenizer, [pair], 128, template="raw").examples
    assert tokenizer.decode(one.input_ids) == "2+2=4" + END
    assert learned(tokenizer, one) == "4" + END


def test_truncated_and_dropped_are_counted(with_template):
    tokenizer = with_template(chat.FALLBACK_TEMPLATE)
    (whole,) = encode(tokenizer, [QUESTION], 128).examples
    prompt = whole.labels.count(IGNORE)
    long_question = example(("user", "why? " * 60), ("assistant", "so"))
    encoding = encode(tokenizer, [QUESTION, long_question], prompt + 1)
    counts = encoding.counts
    assert (counts.examples, counts.truncated, counts.dropped) == (1, 1, 1)
    assert (counts.tokens, counts.answer_tokens) == (prompt + 1, 1)
    assert encoding.examples[0].input_ids == whole.input_ids[: prompt + 1]
    assert encode(tokenizer, [QUESTION], prompt).counts.dropped == 1
    exact = encode(tokenizer, [QUESTION], len(whole.input_ids)).counts
    assert (exact.truncated, exact.dropped) == (0, 0)


def test_a_template_that_refuses_names_the_line(with_template):
    tokenizer = with_template("{{ raise_exception('no system role') }}")
    with pytest.raises(UserError, match=r"d.jsonl:1: the chat template refuses it .*no system role"):
        encode(tokenizer, [QUESTION], 128)


def test_a_template_without_a_generation_prompt_is_refused(with_template):
    tokenizer = with_template("{% for m in messages %}{{ loop.length ~ m['content'] }}{% endfor %}")
    with pytest.raises(UserError, match="does not keep the prompt as the beginning"):
        encode(tokenizer, [QUESTION], 128)


def test_fallback_template_is_given_once_and_saved(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tiny_tokenizer()
    assert chat.ensure_template(tokenizer) is True
    assert chat.ensure_template(tokenizer) is False
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == chat.FALLBACK_TEMPLATE
    assert encode(loaded, [QUESTION], 128).sha256() == encode(tokenizer, [QUESTION], 128).sha256()


def test_trained_tokenizer_is_repeatable_and_covers_every_text():
    texts = ["some text to learn from, some more text"] * 5
    first, second = chat.train_tokenizer(texts, 280), chat.train_tokenizer(iter(texts), 280)
    assert first.get_vocab() == second.get_vocab()
    assert len(first) <= 280
    awkward = "never seen: \x00 ☃ 漢字 \r\n\t"
    assert first.decode(first(awkward)["input_ids"]) == awkward


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(UserError, match="vocab_size 256 is too small.*at least 257"):
        chat.train_tokenizer(["a"], 256)
    assert len(chat.train_tokenizer(["a"], 257)) == 257
