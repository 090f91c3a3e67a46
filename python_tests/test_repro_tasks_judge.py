"""Judged answers: a local endpoint that works, fails for a while, refuses, or is not there; and lm-eval."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from judge_endpoint import completion, endpoint

from epi_kernels.finetune.data import Example
from epi_kernels.repro import lm_eval
from epi_kernels.repro.config import JudgeSpec, TaskSpec
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.tasks import judge, make_task

EXAMPLES = [
    Example(
        (
            ("user", f"What is {i}?"),
            ("assistant", "A number."),
            ("user", "And twice?"),
            ("assistant", str(2 * i)),
        ),
        f"f:{i}",
    )
    for i in range(1, 5)
]
ANSWERS = [str(2 * i) for i in range(1, 5)]


@pytest.fixture
def waits(monkeypatch):
    """The seconds waited for, which nobody waits."""
    waited = []
    monkeypatch.setattr(judge, "time", SimpleNamespace(sleep=waited.append))
    return waited


def judged(url, kept, **spec):
    one = make_task(TaskSpec(kind="ultrachat", judge=JudgeSpec(url=url, model="m", **spec)))
    one.kept = kept
    return one


def test_the_mean_rating_and_what_is_asked(tmp_path, waits, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    with endpoint([completion(f"Good.\nRating: [[{n}]]") for n in (2, 4, 9, 7.5)]) as (url, requests):
        one = judged(url + "/", tmp_path / "kept.jsonl", key_variable="SOME_KEY")
        assert one.metric == "judge's rating, 1-10" and one.full_mark == 10
        assert one.score(ANSWERS, EXAMPLES) == pytest.approx(22.5 / 4)
    assert [request.path for request in requests] == ["/v1/chat/completions"] * 4 and waits == []
    assert {request.key for request in requests} == {"Bearer secret"}
    body = requests[2].body
    assert (body["model"], body["temperature"]) == ("m", 0)
    system, user = body["messages"]
    assert system["role"] == "system" and "[[5]]" in system["content"]
    assert "What is 3?" in user["content"] and "And twice?" in user["content"]
    assert user["content"].endswith("<answer>\n6\n</answer>")
    assert "secret" not in (tmp_path / "kept.jsonl").read_text()


def test_nothing_is_asked_twice(tmp_path, waits):
    kept = tmp_path / "new" / "kept.jsonl"
    with endpoint([completion("[[6]]")]) as (url, requests):
        assert judged(url, kept).score(ANSWERS[:3], EXAMPLES[:3]) == 6
        # A process that was killed while it wrote leaves half a line; that answer alone is asked for again.
        text = kept.read_text()
        kept.write_text(text[:-9])
        assert judged(url, kept).score(ANSWERS, EXAMPLES) == 6
        assert len(requests) == 3 + 2
        assert judged(url, kept).score(ANSWERS, EXAMPLES) == 6
        assert len(requests) == 5
        judged(url, kept).score(["another answer"], EXAMPLES[:1])
        assert len(requests) == 6
    lines = kept.read_text().splitlines()
    assert sum(line.startswith("{") and line.endswith("}") for line in lines) == 5  # 2 whole ones, 3 new ones


def test_a_judge_that_moved_is_the_same_one(tmp_path, waits):
    """Its runs keep their keys and its ratings count: what is left alone is asked at the new address."""
    kept = tmp_path / "kept.jsonl"
    with endpoint([completion("[[6]]")]) as (url, requests):
        judged(url, kept).score(ANSWERS[:3], EXAMPLES[:3])
    with endpoint([completion("[[8]]")]) as (new, requests):
        assert judged(url, kept, address=new + "/").score(ANSWERS, EXAMPLES) == (3 * 6 + 8) / 4
    assert len(requests) == 1
    with pytest.raises(ReproError, match=f"the judge at {new} failed"):  # where it was asked
        judged(url, kept, address=new, retries=0).score(["another"], EXAMPLES[:1])
    spec = JudgeSpec(url=url, model="m")
    assert spec.model_copy(update={"address": new}).model_dump() == spec.model_dump()
    assert JudgeSpec(url=new, model="m").model_dump() != spec.model_dump()


@pytest.mark.parametrize("field", ["url", "address"])
@pytest.mark.parametrize(
    "given", ["", "localhost:8000/v1", "http//x/v1", "http://", "http://a b/v1", "ftp://x/v1"]
)
def test_what_is_no_address_is_refused_before_anything_is_trained(field, given):
    with pytest.raises(ValueError, match="is no address; it begins with http:// or https://"):
        JudgeSpec(**({"url": "http://x/v1", "model": "m"} | {field: given}))


def test_a_key_that_is_none(tmp_path, waits, monkeypatch):
    with endpoint([completion("[[6]]")]) as (url, requests):
        one = judged(url, tmp_path / "kept.jsonl", key_variable="SOME_KEY")
        monkeypatch.setenv("SOME_KEY", " secret\n")  # as a file of keys has it
        assert one.score(ANSWERS[:1], EXAMPLES[:1]) == 6 and requests[0].key == "Bearer secret"
        for wrong in ("a\nb", "k\u20acy"):
            monkeypatch.setenv("SOME_KEY", wrong)
            with pytest.raises(ReproError, match="the variable SOME_KEY holds no key") as error:
                one.score(ANSWERS, EXAMPLES)
            assert wrong not in str(error.value)
        assert len(requests) == 1


def test_fails_for_a_while_then_works(tmp_path, waits):
    passing = [
        (500, b"oops"),
        (429, {}, ("Retry-After", "7")),
        (503, b""),
        (200, b"<html>"),
        (200, {"choices": []}),
    ]
    with endpoint([*passing, completion("Rating: [[8]]")]) as (url, requests):
        assert judged(url, tmp_path / "kept.jsonl").score(ANSWERS[:1], EXAMPLES[:1]) == 8
    assert len(requests) == 6
    assert waits[1] == 7  # what the endpoint asks for
    for attempt in (0, 2, 3, 4):  # doubled, within half of it
        assert 0.5 * 2**attempt <= waits[attempt] <= 1.5 * 2**attempt


def test_a_timeout_is_tried_again(tmp_path, waits, monkeypatch):
    monkeypatch.setattr(judge, "TIMEOUT", 0.1)
    with endpoint([("hang", None), completion("[[3]]")]) as (url, requests):
        assert judged(url, tmp_path / "kept.jsonl").score(ANSWERS[:1], EXAMPLES[:1]) == 3
    assert len(requests) == 2


def test_never_works_and_everything_is_kept(tmp_path, waits):
    kept = tmp_path / "kept.jsonl"
    replies = [completion("[[5]]"), completion("[[7]]"), (500, b"out of memory")]
    with endpoint(replies) as (url, requests):
        with pytest.raises(ReproError) as error:
            judged(url, kept, retries=2).score(ANSWERS, EXAMPLES)
        text = str(error.value)
        assert "failed 3 times: it answered 500" in text and "out of memory" in text
        assert "2 of 4 answers of this task are rated and kept in " + str(kept) in text
        assert "start the same command again" in text
        assert len(requests) == 5 and len(waits) == 2
        replies[:] = [completion("[[9]]")]  # up again: the other two only
        assert judged(url, kept).score(ANSWERS, EXAMPLES) == pytest.approx((5 + 7 + 9 + 9) / 4)
        assert len(requests) == 7


def test_a_rating_is_one_server_s_and_how_it_is_asked_changes_no_run(tmp_path, waits):
    kept = tmp_path / "kept.jsonl"
    with endpoint([completion("[[5]]")]) as (url, _), endpoint([completion("[[9]]")]) as (other, _):
        assert judged(url, kept).score(ANSWERS, EXAMPLES) == 5
        assert judged(other, kept).score(ANSWERS, EXAMPLES) == 9, "another model by the same name"
        assert judged(url + "/", kept).score(ANSWERS, EXAMPLES) == 5
    plain = JudgeSpec(url="http://a/v1", model="m")
    patient = JudgeSpec(url="http://a/v1", model="m", retries=50, key_variable="MY_KEY")
    assert patient.model_dump() == plain.model_dump() and patient.retries == 50
    assert JudgeSpec(url="http://b/v1", model="m").model_dump() != plain.model_dump()


def test_nobody_listens(tmp_path, waits):
    with endpoint([completion("[[5]]")]) as (url, _):
        pass
    with pytest.raises(ReproError, match=r"failed 2 times: .*refused.*0 of 4 answers"):
        judged(url, tmp_path / "kept.jsonl", retries=1).score(ANSWERS, EXAMPLES)


def test_a_refusal_is_final(tmp_path, waits, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with endpoint([(401, {"error": "no key"})]) as (url, requests):
        with pytest.raises(ReproError, match="refused: it answered 401 .*OPENAI_API_KEY.* is not set"):
            judged(url, tmp_path / "kept.jsonl").score(ANSWERS, EXAMPLES)
    assert len(requests) == 1 and requests[0].key is None and waits == []
    with endpoint([(404, b"no such model")]) as (url, requests):
        with pytest.raises(ReproError, match=r"refused: it answered 404 .*no such model.*\. Ratings"):
            judged(url, tmp_path / "kept.jsonl").score(ANSWERS, EXAMPLES)
    assert len(requests) == 1


def test_a_reply_without_a_rating_is_asked_for_one(tmp_path, waits):
    with endpoint([completion("A fine answer."), completion("[[11]]"), completion("[[10]]")]) as (
        url,
        requests,
    ):
        assert judged(url, tmp_path / "kept.jsonl").score(ANSWERS[:1], EXAMPLES[:1]) == 10
    assert [len(request.body["messages"]) for request in requests] == [2, 4, 4]
    assert requests[1].body["messages"][2:] == [
        {"role": "assistant", "content": "A fine answer."},
        {"role": "user", "content": judge.REMINDER},
    ]
    with endpoint([completion("I will not say."), completion(None)]) as (url, _):
        with pytest.raises(ReproError, match="failed 2 times: its reply has no rating from 1 to 10"):
            judged(url, tmp_path / "other.jsonl", retries=1).score(ANSWERS[:1], EXAMPLES[:1])


@pytest.mark.parametrize(
    "reply, rating",
    [
        ("Rating: [[7]]", 7),
        ("[[3]] at first, but [[ 4.5 ]]", 4.5),
        ("[7]", None),
        ("[[0]]", None),
        ("[[10.5]]", None),
        ("", None),
    ],
)
def test_rating_of_a_reply(reply, rating):
    assert judge.rating_of(reply) == rating


def test_the_stand_in_goes_by_another_name(tmp_path):
    one = make_task(TaskSpec(kind="alpaca"))
    assert "ROUGE-L" in one.metric and "not a judge's score" in one.metric
    assert one.score(["2", "Nothing."], EXAMPLES[:2]) == 5
    assert make_task(TaskSpec(kind="alpaca", judge={"url": "http://x", "model": "m"})).metric != one.metric


def test_ratings_go_to_the_cache_folder_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = judge.Judge(JudgeSpec(url="http://a/v1", model="m"))
    other = judge.Judge(JudgeSpec(url="http://a/v1", model="n"))
    assert first.kept.parent == tmp_path / "epi-kernels" / "judge" and first.kept != other.kept


class Model:
    training = True

    def train(self, mode=True):
        self.training = mode


@pytest.fixture
def fake_lm_eval(monkeypatch):
    """Stands for the package, which is not among the tests' dependencies: keeps what it is asked."""
    asked = {}

    def simple_evaluate(model, **arguments):
        model.model.train(False)
        asked.update(arguments)
        if "error" in asked:
            raise ConnectionError("Couldn't reach the Hub")
        return {"results": {arguments["tasks"][0]: {"exact_match,strict-match": 0.25, "acc,none": 0.5}}}

    def wrap(pretrained, tokenizer, batch_size):
        return SimpleNamespace(model=pretrained)

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setitem(sys.modules, "lm_eval.models", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", SimpleNamespace(HFLM=wrap))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=lambda include_path: None))
    return asked


def test_lm_eval_scores_by_its_own_name(fake_lm_eval):
    tokenizer, model = SimpleNamespace(chat_template="..."), Model()
    spec = TaskSpec(kind="gsm8k", harness="lm-eval", test=40)
    assert make_task(spec).metric == "lm-eval gsm8k exact_match (strict-match), %"
    assert make_task(TaskSpec(kind="nli", harness="lm-eval")).metric == "lm-eval mnli acc, %"
    assert lm_eval.score(spec, model, tokenizer) == 25 and model.training
    assert (fake_lm_eval["tasks"], fake_lm_eval["limit"]) == (["gsm8k"], 40)
    assert fake_lm_eval["apply_chat_template"] is True
    assert lm_eval.score(TaskSpec(kind="logiqa", harness="lm-eval"), model, tokenizer) == 50
    fake_lm_eval["error"] = True
    with pytest.raises(ReproError, match=r"task gsm8k: lm-eval failed \(ConnectionError"):
        lm_eval.score(spec, model, tokenizer)
    assert model.training


def test_lm_eval_is_refused_where_it_cannot_serve(monkeypatch, fake_lm_eval):
    with pytest.raises(ReproError, match="task codealpaca: lm-eval evaluates gsm8k, logiqa, nli"):
        make_task(TaskSpec(kind="codealpaca", harness="lm-eval"))
    entry = lm_eval.Entry("mine", "f1,none")
    with pytest.raises(ReproError, match="gave no 'f1,none' for mine, but exact_match"):
        lm_eval.score(TaskSpec(kind="nli"), Model(), SimpleNamespace(chat_template=None), entry=entry)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ReproError, match="needs the package lm_eval"):
        lm_eval.score(TaskSpec(kind="nli"), Model(), SimpleNamespace(chat_template=None))
