"""Pictures of a few coloured shapes on a board of four places, for the tasks that ask about them.

They stand for no task of the papers, which name multimodal settings as future work. Two kinds share what must be
seen and differ in what is asked, so that the second can make a model forget the first.
"""

from __future__ import annotations

import random
from functools import cache

import torch
from torch import Tensor

from epi_kernels.finetune.data import Example
from epi_kernels.repro.pictures import EMBEDDINGS, PICTURE, SIZE, PicturedExample

from .base import Synthetic

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "gold": (230, 190, 30)}
# eight rows of eight pixels
SHAPES = {
    "box": "........ .######. .######. .######. .######. .######. .######. ........",
    "ring": "........ ..####.. .######. .##..##. .##..##. .######. ..####.. ........",
    "cross": "........ ...##... ...##... .######. .######. ...##... ...##... ........",
    "bars": "........ .######. ........ .######. .######. ........ .######. ........",
}
PLACES = list("1234")  # in reading order, two rows of two
CELL = SIZE // 2  # pixels, of a place's side
Scene = dict[str, str]  # place -> "red box"


class Pictured(Synthetic):
    """A kind says by ``ask`` what is asked of a scene. Prompts are drawn as "scene|question"; the scene then becomes
    the picture, so that the same question of another scene is another prompt."""

    things = 3

    def ask(self, scene: Scene, place: str) -> tuple[str, str]:
        """Question and answer about one of the scene's places."""
        raise NotImplementedError

    def draw(self, rng: random.Random) -> tuple[str, str]:
        scene = drawn(rng, self.things)
        question, answer = self.ask(scene, rng.choice(list(scene)))
        return ";".join(f"{place} {thing}" for place, thing in scene.items()) + "|" + question, answer

    def example(self, prompt: str, answer: str, where: str) -> Example:
        scene, question = prompt.split("|")
        things = dict(part.split(" ", 1) for part in scene.split(";"))
        return _pictured(things, question, answer, where)


def drawn(rng: random.Random, things: int) -> Scene:
    """`things` of different colour or shape, at different places in reading order."""
    kinds = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    return dict(zip(sorted(rng.sample(PLACES, things)), rng.sample(kinds, things)))


def _pictured(scene: Scene, question: str, answer: str, where: str) -> PicturedExample:
    messages = (("user", PICTURE * EMBEDDINGS + question), ("assistant", answer))
    return PicturedExample(messages, where, raw=True, picture=paint(scene))


def paint(scene: Scene) -> Tensor:
    """[3, SIZE, SIZE] uint8: black where nothing is."""
    picture = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    for place, thing in scene.items():
        top, left = (CELL * at for at in divmod(PLACES.index(place), 2))
        picture[:, top : top + CELL, left : left + CELL] = _painted(thing)
    return picture


@cache
def _painted(thing: str) -> Tensor:
    """[3, CELL, CELL] uint8"""
    colour, shape = thing.split()
    pixels = torch.tensor([[dot == "#" for dot in row] for row in SHAPES[shape].split()])
    return torch.tensor(COLOURS[colour], dtype=torch.uint8)[:, None, None] * pixels


def captioned(seed: int, n: int) -> list[Example]:
    """Pictures that a base model learns to see from: what stands where, in any order, either said first; no task's
    format."""
    rng = random.Random(f"epi-kernels pictures {seed}")
    examples = []
    for index in range(n):
        scene = drawn(rng, rng.randint(2, 4))
        told = [rng.choice((f"{place} {thing}", f"{thing} {place}")) for place, thing in scene.items()]
        rng.shuffle(told)
        examples.append(_pictured(scene, "", ", ".join(told), f"pictures:{index + 1}"))
    return examples
