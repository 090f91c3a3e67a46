"""Named entities (CoNLL-2003, arXiv cs/0306050), written as text and read back from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from epi_kernels.finetune.data import Example, LineError

from .reading import Hub, Record, column_records, pick
from .real import RealTask, conversation

TYPES = ("PER", "ORG", "LOC", "MISC")
TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")  # the hub's numbers
NONE = "none"
Entity = tuple[str, str]  # type, text


def entities(tokens: Sequence[str], tags: Sequence[str]) -> list[Entity]:
    """Of one sentence, in order. Reads both conventions: B- at every beginning, or only between neighbours (the original)."""
    found: list[tuple[str, list[str]]] = []
    previous = ""
    for token, tag in zip(tokens, tags, strict=True):
        begin, _, kind = tag.partition("-")
        if kind and (begin == "B" or kind != previous):
            found.append((kind, [token]))
        elif kind:
            found[-1][1].append(token)
        previous = kind
    # The two separators of the answer's text would not come back from it.
    return [
        (kind, " ".join(" ".join(words).replace("|", " ").replace(";", " ").split())) for kind, words in found
    ]


def write(found: Iterable[Entity]) -> str:
    """'PER: Ada Lovelace | Charles Babbage; LOC: London', 'none' for no entity."""
    found = list(found)
    groups = [(kind, [text for one, text in found if one == kind]) for kind in TYPES]
    return "; ".join(f"{kind}: {' | '.join(texts)}" for kind, texts in groups if texts) or NONE


def read(text: str) -> Counter[Entity]:
    """The entities of an answer; what is not of the form counts for nothing."""
    found: Counter[Entity] = Counter()
    for group in text.strip().split(";"):
        kind, colon, texts = group.partition(":")
        if colon and kind.strip().upper() in TYPES:
            found.update(
                (kind.strip().upper(), " ".join(one.split())) for one in texts.split("|") if one.strip()
            )
    return found


class Ner(RealTask):
    """Entity-level F1 over all sentences (micro): an entity is right when type and text are, once for each mention.

    conlleval compares places; a text has none, so two equal mentions are told apart by their number only.
    """

    kind = "ner"
    metric = "entity F1, %"
    max_new_tokens = 96
    hub = Hub("eriktks/conll2003", revision="refs/convert/parquet")
    train_files = ("eng.train", "train.txt", "train.conll")
    test_files = ("eng.testb", "test.txt", "test.conll")
    expects = "eng.train and eng.testb (or train.txt, test.txt): one token a line, its tag (I-PER, O, ...) in the last column, a blank line after a sentence"

    def read(self, path: Path) -> Iterator[Record]:
        return column_records(path, ("tokens", "tags"))

    def parse(self, record: Any, where: str) -> Example:
        tokens, tags = pick(record, "tokens"), pick(record, "tags", "ner_tags")
        if (
            not isinstance(tokens, list)
            or not isinstance(tags, list)
            or len(tokens) != len(tags)
            or not tokens
        ):
            raise LineError("tokens and tags must be lists of one length")
        named = [TAGS[tag] if isinstance(tag, int) and 0 <= tag < len(TAGS) else str(tag) for tag in tags]
        unknown = [tag for tag in named if tag not in TAGS]
        if unknown:
            raise LineError(f"the tag {unknown[0]!r} is none of {', '.join(TAGS)}")
        prompt = f"Name the persons (PER), organisations (ORG), places (LOC) and other names (MISC) in this sentence.\n\n{' '.join(tokens)}"
        return conversation(prompt, write(entities(tokens, named)), where)

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> float:
        right = named = wanted = 0
        for answer, example in zip(answers, examples, strict=True):
            ours, gold = read(answer), read(example.messages[-1][1])
            right += sum((ours & gold).values())
            named, wanted = named + sum(ours.values()), wanted + sum(gold.values())
        return 200 * right / (named + wanted) if named + wanted else 100.0
