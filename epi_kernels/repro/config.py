"""What a run is made of: strict, frozen models in which an unknown key is an error.

Everything that changes a result is here and nothing else, because a run is known by the hash of its description.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Schedule = Literal["cosine", "linear", "constant"]
Revision = Annotated[str, Field(min_length=1)]  # on the hub; YAML reads digits alone as a number: quote them


def repeated(values: Sequence[Any]) -> list[Any]:
    """Those that stand there more than once, in their order."""
    return [value for at, value in enumerate(values) if value in values[:at]]


def _distinct(values: Sequence[Any]) -> Sequence[Any]:
    if twice := repeated(values):
        told = "null" if twice[0] is None else twice[0]
        raise ValueError(f"{told} stands there twice")
    return values


Distinct = AfterValidator(_distinct)  # of a list: the same value twice would be one row twice


class Strict(BaseModel):
    """Immutable; an unknown key, a value out of range or no number is an error that names it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Grown(Strict):
    """With fields that came later: left out of the description at their defaults, so that runs that were made before
    keep their keys."""

    later: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _as_it_was(self, handler: Any) -> dict[str, Any]:
        record = handler(self)
        for name in self.later:
            if getattr(self, name) == type(self).model_fields[name].default:
                record.pop(name, None)
        return record


class ModelSpec(Grown):
    """A causal language model: a transformers config with random weights, or a checkpoint (a folder or a hub name).

    A config with a `vision_config` makes one that sees.
    """

    later = ("contents", "revision", "tokenizer_revision")

    config: dict[str, Any] | None = None  # {"model_type": "llama", "hidden_size": 64, ...}
    checkpoint: str | None = None
    tokenizer: str | None = None  # a folder or a hub name; None: the checkpoint's, or characters for a config
    dtype: Literal["float32", "bfloat16"] = "float32"
    contents: str | None = None  # digest of the local folders' files; `reproduce` fills it in
    revision: Revision | None = None  # of the checkpoint's hub name, and of its tokenizer where none is named
    tokenizer_revision: Revision | None = None  # of the tokenizer's hub name

    @model_validator(mode="after")
    def _one_of_two(self) -> ModelSpec:
        if (self.config is None) == (self.checkpoint is None):
            raise ValueError("a model is either a config or a checkpoint")
        if self.revision is not None and self.checkpoint is None:
            raise ValueError("revision is of a checkpoint, and there is none")
        if self.tokenizer_revision is not None and self.tokenizer is None:
            raise ValueError("tokenizer_revision is of a tokenizer, and none is named")
        return self

    @property
    def tokenizer_source(self) -> tuple[str | None, str | None]:
        """Where the tokenizer comes from, and at which revision; None: characters."""
        if self.tokenizer is not None:
            return self.tokenizer, self.tokenizer_revision
        return self.checkpoint, self.revision

    @property
    def sees(self) -> bool:
        """Whether it takes pictures beside text."""
        return "vision_config" in (self.config or {})


class TaskSpec(Grown):
    """A task: its kind (`tasks.KINDS`), where its data lie, and how much of them is used."""

    later = ("contents", "revision")

    kind: str
    source: str | None = None  # a folder in the original format, or a hub name; synthetic kinds have none
    train: Count | None = None  # examples; None: all there are (synthetic kinds: their default)
    test: Count | None = None
    share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the training examples (the imbalance table)
    judge: JudgeSpec | None = None  # of the kinds that are judged
    harness: Literal["own", "lm-eval"] = "own"  # who evaluates; lm-eval: kinds and metrics of `lm_eval.TASKS`
    contents: str | None = None  # digest of a local folder's files; `reproduce` fills it in
    revision: Revision | None = (
        None  # of the hub name: a commit's hash, or a branch or tag, which can be moved
    )


class JudgeSpec(Strict):
    """An OpenAI-compatible endpoint that gives an answer 1 to 10 points.

    How it is asked is no part of a run's description: it has `how` at their defaults, no `address`, and a run that is
    there stays, with what was rated for it.
    """

    how: ClassVar[tuple[str, ...]] = ("key_variable", "retries")

    url: str  # ".../v1"; with `model` who judges: another one is another judge, whose runs are made anew
    model: str
    address: str | None = None  # where the same judge answers by now, if no longer at `url`
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    retries: Annotated[int, Field(ge=0)] = 5

    @field_validator("url", "address")
    @classmethod
    def _is_asked_by_http(cls, value: str | None) -> str | None:
        """Said now, not after the first run that is to be judged was trained."""
        if value is not None and not re.match(r"https?://[^\s/]+\S*\Z", value):
            raise ValueError(
                f"{value!r} is no address; it begins with http:// or https://, as in http://localhost:8000/v1"
            )
        return value

    @model_serializer(mode="wrap")
    def _who_judges(self, handler: Any) -> dict[str, Any]:
        record = handler(self) | {name: type(self).model_fields[name].default for name in self.how}
        record.pop("address")
        return record


class Recipe(Grown):
    """How one stage is trained. Either `steps` or `epochs`."""

    later = ("state_dtype",)

    lr: Annotated[float, Field(gt=0)]
    steps: Count | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch: Count = 64  # examples a step, accumulation included
    accumulation: Count = 1  # micro-batches a step
    clip: Annotated[float, Field(gt=0)] | None = 1.0  # of the gradient's norm
    schedule: Schedule = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03  # share of the steps
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1  # of the peak, at the end
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    max_length: Count = 1024  # tokens; longer examples are cut
    state_dtype: Literal["float32", "bfloat16", "int8"] | None = None  # of MaskedEMAAdamW; None: the weights'

    @model_validator(mode="after")
    def _one_length(self) -> Recipe:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("a recipe has either steps or epochs")
        if self.batch % self.accumulation:
            raise ValueError("batch must be a multiple of accumulation")
        return self
