"""Scores and losses of any task: one forward pass finds what greedy decoding finds, and the model is left as it was."""

from __future__ import annotations

import math
import random

import pytest
import torch

from epi_kernels.finetune.chat import IGNORE
from epi_kernels.finetune.data import Example
from epi_kernels.repro import evaluate as evaluate_
from epi_kernels.repro.characters import ALPHABET, END, make_tokenizer
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.evaluate import encode_task, evaluate, generate, make_batch, prompt_of
from python_tests.tiny_model import tiny_llama

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


class Planted:
    """Examples given, scored either way."""

    kind, metric, full_mark = "planted", "exact match, %", 100.0

    def __init__(self, examples, exact, max_new_tokens=8):
        self.given, self.exact, self.max_new_tokens = examples, exact, max_new_tokens

    def examples(self, split):
        return self.given

    def score(self, answers, examples):
        hits = [answer == one.messages[-1][1] for answer, one in zip(answers, examples, strict=True)]
        return 100.0 * sum(hits) / len(hits)


def make_model():
    return tiny_llama(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        tie_word_embeddings=False,
        initializer_range=0.5,  # attention then matters, and answers differ by prompt
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        use_cache=False,
    )


def raw(prompt, answer):
    return Example((("user", prompt), ("assistant", answer)), "here:1", raw=True)


@pytest.fixture(scope="module")
def planted(tokenizer):
    """(a random model, examples, how many of them it answers rightly and ends): its own answers where it ends in time."""
    model, rng = make_model().eval(), random.Random(5)
    prompts = ["".join(rng.choices(ALPHABET, k=rng.randint(2, 12))) for _ in range(100)]
    examples, right = [], 0
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        answer = []
        while len(answer) < 8 and 1 not in answer:  # greedy, without transformers' generate
            with torch.no_grad():
                answer.append(int(model(input_ids=ids).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([answer[-1:]])], 1)
        text = tokenizer.decode(answer[:-1])
        usable = answer[-1] == 1 and not {0, 1, 2} & set(answer[:-1])
        if usable:
            right += len(examples) % 3 != 0
            examples.append(raw(prompt, text if len(examples) % 3 else text + "a"))
    return model, examples, right


def test_teacher_forcing_finds_what_greedy_decoding_finds(planted, tokenizer):
    model, examples, right = planted
    assert len(examples) >= 6 and 0 < right < len(examples)
    expected = 100.0 * right / len(examples)
    exact, loss = evaluate(model, tokenizer, Planted(examples, exact=True), examples, CPU, 4)
    decoded, same_loss = evaluate(model, tokenizer, Planted(examples, exact=False), examples, CPU, 4)
    assert exact == decoded == pytest.approx(expected)
    assert loss == same_loss


def test_an_answer_that_goes_on_is_wrong(planted, tokenizer):
    """Every token is right but the end: alone in its batch, too, where nothing is padded."""
    model, examples, _ = planted
    right = [one.messages for i, one in enumerate(examples) if i % 3 and len(one.messages[1][1]) > 1]
    cut = [raw(prompt, answer[:-1]) for (_, prompt), (_, answer) in right]
    assert cut and evaluate(model, tokenizer, Planted(cut, exact=True), cut, CPU, 1)[0] == 0


def test_the_loss_is_the_mean_over_all_answer_tokens(planted, tokenizer):
    model, examples, _ = planted
    nats, tokens = 0.0, 0
    for one in examples:
        (prompt, answer), *_ = [(one.messages[0][1], one.messages[1][1])]
        ids = tokenizer(prompt + answer + END, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        for place in range(len(prompt), ids.shape[1]):
            nats -= float(logs[place - 1, ids[0, place]])
            tokens += 1
    loss = evaluate(model, tokenizer, Planted(examples, exact=True), examples, CPU, 5)[1]
    assert loss == pytest.approx(nats / tokens, rel=1e-5)


def test_answers_do_not_depend_on_the_batch(planted, tokenizer):
    model, examples, _ = planted
    together = generate(model, tokenizer, examples, CPU, 100, 8)
    assert together == generate(model, tokenizer, examples, CPU, 1, 8)
    assert len(set(together)) > 1


def test_the_model_is_left_as_it_was(planted, tokenizer):
    model, examples, right = planted
    model.train()
    model.model.norm.eval()  # a module in a mode of its own
    model.generation_config.update(do_sample=True, temperature=9.0, min_new_tokens=30, repetition_penalty=3.0)
    own, state = model.generation_config, torch.get_rng_state()
    try:
        weights = [weight.clone() for weight in model.parameters()]
        score, _ = evaluate(model, tokenizer, Planted(examples, exact=False), examples, CPU, 50)
        assert score == pytest.approx(100.0 * right / len(examples))  # none of the settings above
        assert model.training and model.model.layers[0].training and not model.model.norm.training
        assert model.generation_config is own and own.do_sample
        assert torch.equal(torch.get_rng_state(), state)
        assert all(map(torch.equal, weights, model.parameters()))
        assert all(weight.grad is None for weight in model.parameters())
    finally:
        model.eval()
        model.generation_config = type(own)()


def test_length_limits(planted, tokenizer):
    model, examples, _ = planted
    task = Planted(examples, exact=True)
    whole = evaluate(model, tokenizer, task, examples, CPU, 50)
    long = raw("a" * 90, "b")
    score, loss = evaluate(model, tokenizer, task, [*examples, long], CPU, 50, max_length=64)
    assert score == pytest.approx(whole[0] * len(examples) / (len(examples) + 1))  # too long is wrong
    assert loss == pytest.approx(whole[1])
    with pytest.raises(ReproError, match="planted: no example has at most 2 tokens"):
        evaluate(model, tokenizer, task, examples, CPU, 50, max_length=2)
    cut = generate(model, tokenizer, [raw("xyz" + examples[0].messages[0][1], "")], CPU, 1, 8, 10)
    room = examples[0].messages[0][1][-2:]
    assert cut == generate(model, tokenizer, [raw(room, "")], CPU, 1, 8)


def test_conversations_go_through_a_chat_template():
    tokenizer = make_tokenizer()
    turns = (("user", "ab"), ("assistant", "cd"), ("user", "ef"), ("assistant", "gh"))
    one = Example(turns, "here:1")
    assert tokenizer.chat_template is None
    (row,) = encode_task(tokenizer, [one], 200).examples
    assert tokenizer.chat_template
    assert tokenizer.decode([token for token in row.labels if token != IGNORE]) == f"cd{END}gh{END}"
    ids = tokenizer(prompt_of(tokenizer, one), add_special_tokens=False)["input_ids"]
    assert row.input_ids[: len(ids)] == ids  # what it is asked with is what it was trained on
    assert tokenizer.decode(row.input_ids[len(ids) :]) == "gh" + END
    model = make_model().eval()
    score, loss = evaluate(model, tokenizer, Planted([one], exact=False), [one], CPU, 1)
    assert score == 0.0 and math.isfinite(loss)


def test_batches_name_their_tasks(tokenizer):
    rows = encode_task(tokenizer, [raw("ab", "c"), raw("a", "bcde")], 64).examples
    batch = make_batch(rows, 0, CPU, [1, 0])
    assert batch.input_ids.shape == batch.labels.shape == batch.attention_mask.shape == (2, 6)
    assert batch.task.tolist() == [1, 0] and batch.attention_mask.sum(1).tolist() == [4, 6]
    assert batch.labels[0].tolist() == [IGNORE, IGNORE, *rows[0].input_ids[2:], IGNORE, IGNORE]
    assert make_batch(rows, 0, CPU, 2).task.tolist() == [2, 2]


def test_portions_hold_as_many_rows_as_fit(monkeypatch):
    monkeypatch.setattr(evaluate_, "PASS_BYTES", 1000)
    lengths = [1, 2, 30, 4, 5, 200, 6, 7, 8]
    found = list(evaluate_.portions(lengths, 3, 10))
    assert [lengths[one] for one in found] == [[1, 2, 30], [4, 5], [200], [6, 7, 8]]
    assert list(evaluate_.portions([], 3, 10)) == []
    assert [one.stop - one.start for one in evaluate_.portions([1] * 450, 200, 1)] == [200, 200, 50]


def test_a_token_costs_its_logits_and_its_keys_and_values():
    model = make_model()
    assert evaluate_.token_bytes(model) == 4 * 64 + 2 * 2 * (2 * 16) * 4  # 2 layers of 2 heads of 16, float32
    assert evaluate_.token_bytes(model.bfloat16()) == 4 * 64 + 2 * 2 * (2 * 16) * 2


def test_a_pass_of_few_rows_finds_the_same(planted, tokenizer, monkeypatch):
    model, examples, _ = planted
    tasks = [Planted(examples, exact) for exact in (True, False)]
    whole = [evaluate(model, tokenizer, task, examples, CPU, 50) for task in tasks]
    rows: list[int] = []
    monkeypatch.setattr(evaluate_, "PASS_BYTES", 30 * evaluate_.token_bytes(model))
    hook = model.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    few = [evaluate(model, tokenizer, task, examples, CPU, 50) for task in tasks]
    hook.remove()
    assert max(rows) < len(examples)
    assert [one[0] for one in few] == [one[0] for one in whole]
    assert [one[1] for one in few] == pytest.approx([one[1] for one in whole], rel=1e-5)
