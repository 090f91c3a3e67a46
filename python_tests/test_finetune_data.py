"""JSONL in three forms, its errors, and the split into training and validation."""

from __future__ import annotations

import json

import pytest

from epi_kernels.finetune import data
from epi_kernels.finetune.errors import UserError
from python_tests.tiny_model import qa, write_jsonl

MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def test_three_forms_become_the_same_conversation(tmp_path):
    path = write_jsonl(
        tmp_path / "d.jsonl",
        [
            MESSAGES,
            {"prompt": "Hi", "completion": "Hello", "id": 7},
            {"instruction": "Hi", "output": "Hello"},
            {"instruction": "Hi", "input": "", "output": "Hello"},
            {"instruction": "Hi", "input": None, "output": "Hello"},
        ],
    )
    examples = data.read_jsonl(path)
    assert [one.messages for one in examples] == [(("user", "Hi"), ("assistant", "Hello"))] * 5
    assert [one.raw for one in examples] == [False, True, False, False, False]
    assert examples[1].where == f"{path}:2"


def test_alpaca_input_follows_the_instruction(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"instruction": "Add.", "input": "1, 2", "output": "3"}])
    assert data.read_jsonl(path)[0].messages[0] == ("user", "Add.\n\n1, 2")


def test_unicode_byte_order_mark_blank_lines_and_no_last_newline(tmp_path):
    path = tmp_path / "d.jsonl"
    lines = [
        json.dumps({"prompt": "質問 🙂", "completion": "Ä\u2028ß"}, ensure_ascii=False),
        "",
        "  ",
        json.dumps(MESSAGES),
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    examples = data.read_jsonl(path)
    assert len(examples) == 2
    assert examples[0].messages == (("user", "質問 🙂"), ("assistant", "Ä\u2028ß"))
    assert examples[1].where == f"{path}:4"


def turns(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


WRONG = {
    "not an object": ("[1]\n", "looks like a JSON array"),
    "a number": ("3\n", "is a JSON int"),
    "not JSON": ('{"prompt": "a", \n', "is not JSON"),
    "no known keys": (
        '{"text": "a", "label": 3}\n',
        'has none of the accepted sets of keys (its keys: "text", "label")',
    ),
    "half a form": ('{"prompt": "a"}\n', "has none of the accepted sets of keys"),
    "two forms": (json.dumps({**MESSAGES, "prompt": "a", "completion": "b"}), "fits more than one form"),
    "empty answer": ('{"prompt": "a", "completion": ""}', '"completion" is empty'),
    "blank answer": ('{"instruction": "a", "output": " \\n"}', '"output" is empty'),
    "number for text": ('{"prompt": 1, "completion": "b"}', '"prompt" must be a string, is int'),
    # More digits than Python converts: which fault it is depends on the version.
    "a huge number": ('{"prompt": ' + "1" * 6000 + ', "completion": "b"}', "d.jsonl:2: "),
    "null answer": ('{"prompt": "a", "completion": null}', '"completion" must be a string, is NoneType'),
    "half a surrogate": ('{"prompt": "a", "completion": "\\ud800"}', "half of a surrogate pair"),
    "messages no list": ('{"messages": "hi"}', '"messages" must be a non-empty list'),
    "no messages": ('{"messages": []}', '"messages" must be a non-empty list'),
    "message without content": (
        '{"messages": [{"role": "user"}]}',
        'message 1 must be an object with "role"',
    ),
    "unknown role": (
        json.dumps(turns(("user", "a"), ("tool", "b"))),
        "message 2 has role 'tool', not one of",
    ),
    "ends with a question": (
        json.dumps(turns(("user", "a"), ("assistant", "b"), ("user", "c"))),
        "the last message must be",
    ),
    "answers nothing": (json.dumps(turns(("assistant", "b"))), "an assistant message alone"),
    "empty turn": (
        json.dumps(turns(("user", "a"), ("assistant", ""))),
        'message 2 (assistant): "content" is empty',
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_file_line_fault_and_what_is_accepted(tmp_path, name):
    line, fault = WRONG[name]
    first = "" if name == "not an object" else json.dumps(MESSAGES) + "\n"
    path = tmp_path / "d.jsonl"
    path.write_text(first + line)
    with pytest.raises(UserError) as caught:
        data.read_jsonl(path)
    text = str(caught.value)
    assert fault in text
    assert str(path) + ("" if name == "not an object" else ":2: ") in text
    assert '"messages"' in text and '"completion"' in text and '"instruction"' in text
    assert caught.value.status == 2


def test_many_wrong_lines_are_counted_not_listed(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("nonsense\n" * 9)
    with pytest.raises(UserError) as caught:
        data.read_jsonl(path)
    assert ":5: " in str(caught.value) and ":6: " not in str(caught.value)
    assert "4 more wrong lines" in str(caught.value)


def test_bytes_that_are_not_utf8_name_the_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(MESSAGES).encode() + b"\n\xff\xfe\n")
    with pytest.raises(UserError, match=r":2: is not UTF-8"):
        data.read_jsonl(path)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_says_so(tmp_path, content):
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="holds no examples"):
        data.read_jsonl(path)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        data.read_jsonl(tmp_path / "none.jsonl")


def read(tmp_path, records):
    return data.read_jsonl(write_jsonl(tmp_path / "s.jsonl", records))


def test_split_is_disjoint_in_content_seeded_and_complete(tmp_path):
    examples = read(tmp_path, qa(40) * 2)  # every example twice
    train, validation = data.split(examples, 0.1, seed=3)
    assert len(train) + len(validation) == 80
    assert len(validation) == 8
    assert not {one.key for one in train} & {one.key for one in validation}
    again = data.split(examples, 0.1, seed=3)
    assert again == (train, validation)
    assert data.split(examples, 0.1, seed=4)[1] != validation


@pytest.mark.parametrize(
    "count, fraction, held_out", [(1, 0.5, 0), (2, 0.001, 1), (2, 0.99, 1), (3, 0.999, 2), (10, 0.0, 0)]
)
def test_split_of_tiny_data_keeps_something_to_train_on(tmp_path, count, fraction, held_out):
    train, validation = data.split(read(tmp_path, qa(count)), fraction, seed=0)
    assert (len(train), len(validation)) == (count - held_out, held_out)


def test_sample_keeps_order_and_depends_on_the_seed_alone(tmp_path):
    examples = read(tmp_path, qa(30))
    chosen = data.sample(examples, 7, seed=1)
    assert len(chosen) == 7
    assert chosen == [one for one in examples if one in chosen]
    assert chosen == data.sample(examples, 7, seed=1)
    assert data.sample(examples, 0, seed=1) == examples
    assert data.sample(examples, 99, seed=1) == examples
