"""What the real tasks share: where their data come from, and which of them are used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from epi_kernels.finetune.data import Example, parse, sample, split
from epi_kernels.repro import lm_eval
from epi_kernels.repro.config import TaskSpec
from epi_kernels.repro.errors import ReproError

from .reading import Dropped, Hub, Record, find, hub_records, json_records, parsed, pick_text

HELD_OUT = 0.05  # of a data set without a test split of its own
SPLIT_SEED = 0  # one split and one choice of examples for all seeds of a table


def conversation(prompt: str, answer: str, where: str) -> Example:
    """One question and its answer."""
    return Example((("user", prompt), ("assistant", answer)), where)


def without_answer(text: str) -> None:
    """Alpaca and its kin hold a few empty outputs: nothing to learn from."""
    if not text.strip():
        raise Dropped("empty answer")


def instruction(record: Any, where: str) -> Example:
    """A record of Alpaca's form. Raises LineError, or Dropped."""
    pick_text(record, "instruction")
    without_answer(pick_text(record, "output", allow_empty=True))
    return parse({key: record.get(key) for key in ("instruction", "input", "output")}, where)


class RealTask:
    """Base of the real tasks; a subclass says how its files are called, read and turned into Examples.

    `spec.source` is a folder in the original format, a hub name, or None for `hub`. Data sets without a test split
    give up HELD_OUT of their distinct examples, the same ones for every seed and every `spec.train`. Training examples
    that the test split holds, too, are left out. `dropped` counts what was left out, by split and reason.
    """

    kind: ClassVar[str]
    metric: str
    full_mark: float = 100
    exact: bool = False
    max_new_tokens: int
    hub: ClassVar[Hub]
    train_files: ClassVar[tuple[str, ...]]  # patterns, the first that fits counts
    test_files: ClassVar[tuple[str, ...]] = ()
    test_required: ClassVar[bool] = True  # False: a share is held out where no file fits
    expects: ClassVar[str]  # the format, for messages
    judged: ClassVar[bool] = False

    def __init__(self, spec: TaskSpec, seed: int = 0):
        self.spec = spec
        self.dropped: dict[str, dict[str, int]] = {}
        self._splits: dict[str, list[Example]] | None = None
        if spec.judge is not None and not self.judged:
            raise ReproError(f"task {self.kind}: is not judged ({self.metric}); leave out `judge`")
        if spec.harness == "lm-eval":
            self.metric = lm_eval.metric(self.kind)

    def parse(self, record: Any, where: str) -> Example:
        """One record of a file or of the hub. Raises LineError, or Dropped."""
        raise NotImplementedError

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> float:
        raise NotImplementedError

    def read(self, path: Path) -> Iterator[Record]:
        """The records of one file."""
        return json_records(path)

    def held_out(self, examples: list[Example]) -> tuple[list[Example], list[Example]]:
        """(training, test) of a data set without a test split."""
        return split(examples, HELD_OUT, SPLIT_SEED)

    def examples(self, split: Literal["train", "test"]) -> list[Example]:
        """As many of a split as the spec asks for, the same ones for every seed. Raises ReproError."""
        if self._splits is None:
            self._splits = self._read()
        chosen = self._splits[split]
        count = (self.spec.train if split == "train" else self.spec.test) or 0
        chosen = sample(chosen, count, SPLIT_SEED)
        if split == "train" and self.spec.share < 1:
            chosen = sample(chosen, max(1, round(self.spec.share * len(chosen))), SPLIT_SEED)
        return list(chosen)

    def _read(self) -> dict[str, list[Example]]:
        train, test = self._records()
        splits = {"train": self._parsed("train", train)}
        if test is None:
            splits["train"], splits["test"] = self.held_out(splits["train"])
        else:
            splits["test"] = self._parsed("test", test)
        for name, examples in splits.items():
            if not examples:
                raise ReproError(
                    f"task {self.kind}: no {name} examples in {self.spec.source or self.hub.name}; expected: {self.expects}"
                )
        seen = {example.key for example in splits["test"]}
        kept = [example for example in splits["train"] if example.key not in seen]
        if not kept:
            raise ReproError(f"task {self.kind}: all training examples are in the test split, too")
        if len(kept) < len(splits["train"]):
            self.dropped["train"]["also in the test split"] = len(splits["train"]) - len(kept)
        return {"train": kept, "test": splits["test"]}

    def _parsed(self, name: str, records: Iterator[Record]) -> list[Example]:
        examples, self.dropped[name] = parsed(records, self.parse, self.expects)
        return examples

    def _records(self) -> tuple[Iterator[Record], Iterator[Record] | None]:
        """(training, test) records; no test records where the data set has no test split."""
        source = self.spec.source
        if source is not None and Path(source).expanduser().is_dir():
            return self._of_folder(Path(source).expanduser())
        if source is not None and (
            Path(source).is_absolute() or source.startswith((".", "~")) or "/" not in source
        ):
            raise ReproError(f"task {self.kind}: {source} is no folder; expected: {self.expects}")
        hub = self.on_hub(self.spec)
        train, test = (
            hub_records(hub, one, self.kind, self.expects) if one else None for one in (hub.train, hub.test)
        )
        assert train is not None
        return train, test

    @classmethod
    def on_hub(cls, spec: TaskSpec) -> Hub:
        """Where the data of a spec without a local folder lie."""
        own = cls.hub if spec.source is None else replace(cls.hub, name=spec.source, revision=None)
        return own if spec.revision is None else replace(own, revision=spec.revision)

    @classmethod
    def files(cls, folder: Path) -> tuple[list[Path], list[Path]]:
        """Those of a folder that fit the (training, test) patterns."""
        return find(folder, cls.train_files), find(folder, cls.test_files)

    def _of_folder(self, folder: Path) -> tuple[Iterator[Record], Iterator[Record] | None]:
        train, test = self.files(folder)
        if not train or (self.test_required and not test):
            missing = self.test_files if train else self.train_files
            raise ReproError(
                f"task {self.kind}: {folder} holds no {' or '.join(missing)}; expected: {self.expects}"
            )
        # A file that both patterns fit is a test file.
        return self._each([path for path in train if path not in test]), self._each(test) if test else None

    def _each(self, paths: Sequence[Path]) -> Iterator[Record]:
        for path in paths:
            yield from self.read(path)
