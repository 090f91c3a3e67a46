"""Pictures beside text: what an example carries of them, and how its tokens make room for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from epi_kernels.finetune.chat import Encoded, Encoding
from epi_kernels.finetune.data import Example
from epi_kernels.repro.errors import ReproError

PICTURE = "\ufffc"  # a character of its own in a prompt, as often as the model has embeddings of the picture
SIZE, PATCH = 16, 8  # pixels, of the synthetic tasks' pictures and of what a model sees as one
EMBEDDINGS = (SIZE // PATCH) ** 2


@dataclass(frozen=True)
class PicturedExample(Example):
    """A conversation about one picture; its prompt begins with EMBEDDINGS times PICTURE."""

    picture: Tensor | None = field(default=None, compare=False)  # [3, SIZE, SIZE] uint8


@dataclass
class Pictured(Encoded):
    """Tokens of one example, and its picture."""

    picture: Tensor


def with_pictures(examples: Sequence[Example], encoding: Encoding) -> Encoding:
    """The encoding of these examples with their pictures, where they have any. Raises ReproError."""
    pictures = [one.picture for one in examples if isinstance(one, PicturedExample)]
    if not pictures:
        return encoding
    if not len(pictures) == len(examples) == len(encoding.examples):
        raise ReproError("a task's examples must all have a picture, and none be dropped; raise max_length")
    rows: list[Encoded] = [
        Pictured(one.input_ids, one.labels, picture)
        for one, picture in zip(encoding.examples, pictures)
        if picture is not None
    ]
    return Encoding(rows, encoding.counts)
