"""Models that see: the picture says what the answer says, and all three parts are trained, isolated and frozen."""

from __future__ import annotations

import pytest
import torch
from repro_runs import RECIPE, SUMS
from safetensors.torch import load_file

from epi_kernels.finetune.model import pad_id
from epi_kernels.repro import stages
from epi_kernels.repro.config import ModelSpec, TaskSpec
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.evaluate import encode_task, make_batch
from epi_kernels.repro.execute import ensure
from epi_kernels.repro.methods.config import Epi, Full, Static
from epi_kernels.repro.models import load_model, new_model, tokenizer_of
from epi_kernels.repro.pictures import EMBEDDINGS, PICTURE, SIZE, PicturedExample
from epi_kernels.repro.runs import Base, Train, ancestry, key
from epi_kernels.repro.store import ISOLATION, Store
from epi_kernels.repro.tasks import PICTURED, make_task
from epi_kernels.repro.tasks.synthetic.pictured import CELL, COLOURS, PLACES, SHAPES
from epi_kernels.repro.workshop import Workshop, examples_of

CPU = torch.device("cpu")
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = {
    "model_type": "llava",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "tie_word_embeddings": True,
    "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **SMALL},
    "text_config": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True, **SMALL},
}
SEES = ModelSpec(config=CONFIG)
SHAPES_TASK, PLACES_TASK = (TaskSpec(kind=kind, train=160, test=20) for kind in PICTURED)


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    monkeypatch.setattr(stages, "PICTURES", 40)
    stages._pictures.cache_clear()
    yield
    stages._pictures.cache_clear()


def seen(picture: torch.Tensor) -> dict[str, str]:
    """What stands where, read off the pixels and not off what was painted."""
    found = {}
    for at, place in enumerate(PLACES):
        top, left = CELL * (at // 2), CELL * (at % 2)
        cell = picture[:, top : top + CELL, left : left + CELL]
        dots = cell.sum(0) > 0
        if not dots.any():
            continue
        colour = tuple(cell[:, dots][:, 0].tolist())
        assert bool((cell[:, dots] == cell[:, dots][:, :1]).all())
        rows = " ".join("".join(".#"[bool(dot)] for dot in row) for row in dots)
        names = [name for name, one in COLOURS.items() if one == colour]
        shapes = [name for name, one in SHAPES.items() if one == rows]
        found[place] = f"{names[0]} {shapes[0]}"
    return found


@pytest.mark.parametrize("kind", PICTURED)
def test_the_picture_says_what_the_answer_says(kind):
    task = make_task(TaskSpec(kind=kind, train=300, test=50), seed=3)
    train, test = task.examples("train"), task.examples("test")
    told = set()
    for one in train + test:
        assert isinstance(one, PicturedExample) and one.picture.shape == (3, SIZE, SIZE)
        scene, prompt, answer = seen(one.picture), one.messages[0][1], one.messages[1][1]
        assert len(scene) == task.things == len(set(scene.values()))
        question = prompt.removeprefix(PICTURE * EMBEDDINGS).removesuffix("=")
        by_thing = {thing: place for place, thing in scene.items()}
        assert answer == (scene if kind == "shapes" else by_thing)[question]
        assert len(answer) < task.max_new_tokens
        told.add((str(scene), question))
    assert len(told) == 350  # no prompt twice, so that the splits are disjoint


@pytest.mark.parametrize("kind", ["sums", *PICTURED])
def test_every_seed_has_examples_of_its_own(kind):
    """Else seeds would say nothing of which examples were drawn."""
    spec = TaskSpec(kind=kind, train=20, test=5)
    for split in ("train", "test"):
        one, other = (examples_of(spec, seed, split)[1] for seed in (1, 2))
        assert one != other and one == examples_of(spec, 1, split)[1]


def test_captions_name_what_is_there():
    for one in stages.captioned(0, 40):
        scene, told = seen(one.picture), one.messages[1][1].split(", ")
        pairs = [part.split(" ") for part in told]
        read = {p[0]: " ".join(p[1:]) if p[0] in PLACES else "" for p in pairs if p[0] in PLACES}
        read |= {p[-1]: " ".join(p[:-1]) for p in pairs if p[-1] in PLACES}
        assert read == scene


def test_a_batch_has_its_rows_pictures():
    tokenizer = tokenizer_of(SEES)
    rows = encode_task(tokenizer, make_task(SHAPES_TASK).examples("train"), 64).examples
    batch = make_batch(rows[:6], pad_id(tokenizer), CPU)
    placed = tokenizer.convert_tokens_to_ids(PICTURE)
    assert batch.input_ids.eq(placed).sum(1).tolist() == [EMBEDDINGS] * 6
    assert torch.equal(batch.rows(slice(2, 4)).pictures, torch.stack([one.picture for one in rows[2:4]]))
    text = encode_task(tokenizer, make_task(SUMS).examples("train"), 64).examples
    assert make_batch(text[:2], 0, CPU).pictures is None
    with pytest.raises(ReproError, match="pictures"):
        make_batch([rows[0], text[0]], 0, CPU)
    with pytest.raises(ReproError, match="max_length"):
        encode_task(tokenizer, make_task(SHAPES_TASK).examples("train"), EMBEDDINGS)


def test_another_size_of_picture_is_refused():
    wrong = {**CONFIG, "vision_config": {**CONFIG["vision_config"], "image_size": 2 * SIZE}}
    with pytest.raises(ReproError, match="image_size"):
        new_model(ModelSpec(config=wrong), 0)


def test_what_is_seen_matters_and_every_part_is_trained_isolated_and_frozen(tmp_path):
    base = Base(model=SEES, recipe=RECIPE)
    tasks = (SHAPES_TASK, PLACES_TASK)
    first = Train(
        before=base, tasks=tasks[:1], evaluate=tasks, recipe=RECIPE, method=Full(optimizer="epi"), seed=1
    )
    epi = Epi(ratio=0.2, interval=2)
    evolving = Train(
        before=first, tasks=tasks[1:], evaluate=tasks, recipe=RECIPE, method=epi, seed=1,
        observe=("drift:batches=1,every=6",),
    )  # fmt: skip
    frozen = evolving.model_copy(update={"method": Static(by="delta", ratio=0.2), "observe": ()})
    keep = frozenset(map(key, [*ancestry(evolving), frozen]))
    bench = Workshop(Store(tmp_path), CPU, keep=keep)
    found, kept = ensure(evolving, bench), ensure(frozen, bench)
    drift = found.series["drift"]
    assert {"vision", "projector", "embedding", "q"} <= drift["elements"].keys()
    # the whole mask, and of every kind some or none
    assert drift["optimizer"][-1]["share"]["all"] == pytest.approx(0.2, abs=0.01)
    assert kept.notes["isolated"] == int(0.2 * found.bytes.parameters)
    before, after = (load_file(tmp_path / key(run) / "model.safetensors") for run in (first, frozen))
    parts = ("vision_tower.encoder", "multi_modal_projector", "language_model")
    for part in parts:
        # as the model names them: what cores and importance go by
        names = [name for name in before if part in name and name.startswith("model.")]
        still = [(before[name] == after[name]).float().mean() for name in names]
        assert names and 0 < sum(still) and any(one < 1 for one in still), part
    assert (tmp_path / key(first) / ISOLATION).is_file()
    model, tokenizer = load_model(tmp_path / key(first), SEES, CPU).eval(), tokenizer_of(SEES)
    batch = make_batch(
        encode_task(tokenizer, make_task(SHAPES_TASK).examples("test"), 64).examples[:2],
        pad_id(tokenizer),
        CPU,
    )
    from epi_kernels.repro.methods.base import token_loss

    blind = batch._replace(pictures=torch.zeros_like(batch.pictures))
    with torch.no_grad():
        assert token_loss(model, batch) != token_loss(model, blind)
