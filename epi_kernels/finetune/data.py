"""JSONL in the three forms people have, each line checked; examples split into training and validation."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

ACCEPTED = (
    'accepted, one JSON object a line: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
    ' or {"prompt": "...", "completion": "..."} or {"instruction": "...", "input": "..." (optional), "output": "..."}'
)
ROLES = ("system", "user", "assistant")
SHOWN_ERRORS = 5


@dataclass(frozen=True)
class Example:
    """One conversation. `raw` marks a prompt/completion pair, which can also be trained on without a chat template."""

    messages: tuple[tuple[str, str], ...]  # (role, content), the last one the assistant's
    where: str  # "FILE:LINE", for messages
    raw: bool = False

    @property
    def key(self) -> str:
        """Identifies the content: two lines with the same content have the same key."""
        return hashlib.sha256(json.dumps(self.messages).encode()).hexdigest()


class LineError(Exception):
    """What is wrong with one record; the reader puts its place before it."""


def text_field(record: dict, key: str, allow_empty: bool = False) -> str:
    """The string under `key`. Raises LineError."""
    value = record[key]
    if not isinstance(value, str):
        raise LineError(f'"{key}" must be a string, is {type(value).__name__}')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise LineError(f'"{key}" holds half of a surrogate pair, which is no text') from None
    if not allow_empty and not value.strip():
        raise LineError(f'"{key}" is empty')
    return value


def _messages(record: dict) -> tuple[tuple[str, str], ...]:
    turns = record["messages"]
    if not isinstance(turns, list) or not turns:
        raise LineError('"messages" must be a non-empty list')
    result = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise LineError(f'message {number} must be an object with "role" and "content"')
        if turn["role"] not in ROLES:
            raise LineError(f"message {number} has role {turn['role']!r}, not one of {', '.join(ROLES)}")
        try:
            content = text_field(turn, "content", allow_empty=turn["role"] != "assistant")
        except LineError as error:
            raise LineError(f"message {number} ({turn['role']}): {error}") from None
        result.append((turn["role"], content))
    if result[-1][0] != "assistant":
        raise LineError("the last message must be the assistant's, for it is what is learned")
    if len(result) == 1:
        raise LineError("an assistant message alone answers nothing; a user message must come before it")
    return tuple(result)


def parse(record: object, where: str) -> Example:
    """One decoded line as an Example. Raises LineError saying what is wrong."""
    if not isinstance(record, dict):
        raise LineError(f"is a JSON {type(record).__name__}, not an object")
    forms = [
        name
        for name, keys in (
            ("messages", {"messages"}),
            ("prompt/completion", {"prompt", "completion"}),
            ("Alpaca", {"instruction", "output"}),
        )
        if keys <= record.keys()
    ]
    if not forms:
        have = ", ".join(f'"{key}"' for key in list(record)[:8]) or "none"
        raise LineError(f"has none of the accepted sets of keys (its keys: {have})")
    if len(forms) > 1:
        raise LineError(f"fits more than one form ({' and '.join(forms)})")
    if forms[0] == "messages":
        return Example(_messages(record), where)
    if forms[0] == "prompt/completion":
        return Example(
            (("user", text_field(record, "prompt")), ("assistant", text_field(record, "completion"))),
            where,
            raw=True,
        )
    prompt = text_field(record, "instruction")
    if record.get("input") is not None and text_field(record, "input", allow_empty=True).strip():
        prompt += "\n\n" + record["input"]
    return Example((("user", prompt), ("assistant", text_field(record, "output"))), where)


def first_of(errors: Sequence[str]) -> str:
    """The first wrong lines and how many more there are."""
    more = f"\n... and {len(errors) - SHOWN_ERRORS} more wrong lines" if len(errors) > SHOWN_ERRORS else ""
    return "\n".join(errors[:SHOWN_ERRORS]) + more


def lines_of(path: Path, refusal: type[UserError] = UserError) -> Iterator[tuple[int, str | LineError]]:
    """A stripped line at a time, numbered from 1: some files are larger than a memory. Raises `refusal`."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise refusal(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        for number, line in enumerate(file, 1):
            try:
                # utf-8-sig: some editors put a byte-order mark before the first line.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                yield number, LineError(f"is not UTF-8 (byte {error.start})")


def read_jsonl(path: str | Path) -> list[Example]:
    """All examples of a file. Raises UserError that names file and line of the first wrong lines and what is accepted."""
    path = Path(path)
    examples: list[Example] = []
    errors: list[str] = []
    for number, line in lines_of(path):
        where = f"{path}:{number}"
        try:
            if isinstance(line, LineError):
                raise line
            if not line:
                continue
            if number == 1 and line.startswith("["):
                raise UserError(
                    f"{path}: looks like a JSON array; write one object a line instead\n{ACCEPTED}"
                )
            examples.append(parse(json.loads(line), where))
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, too
            errors.append(f"{where}: is not JSON ({error})")
        except LineError as error:
            errors.append(f"{where}: {error}")
    if errors:
        raise UserError(f"{first_of(errors)}\n{ACCEPTED}")
    if not examples:
        raise UserError(f"{path}: holds no examples\n{ACCEPTED}")
    return examples


def split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, validation), disjoint in content: copies of one example land on the same side.

    At least one distinct example stays on each side; a single distinct example, or fraction 0, gives no validation.
    """
    keys = list(dict.fromkeys(example.key for example in examples))
    if fraction <= 0 or len(keys) < 2:
        return list(examples), []
    random.Random(f"validation split {seed}").shuffle(keys)
    held_out = set(keys[: min(len(keys) - 1, max(1, round(fraction * len(keys))))])
    train = [example for example in examples if example.key not in held_out]
    return train, [example for example in examples if example.key in held_out]


def sample(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """At most `count` examples in file order, the same ones for the same seed; 0 keeps all."""
    if count <= 0 or len(examples) <= count:
        return list(examples)
    return [examples[i] for i in sorted(random.Random(f"sample {seed}").sample(range(len(examples)), count))]
