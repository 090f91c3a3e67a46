"""Importance, drift and the kinds of tensors that observers tell of, against plain ones in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from epi_kernels.reference.bits import unpack
from epi_kernels.repro.measure.importance import top_set
from epi_kernels.repro.measure.kinds import ORDER, kind_of
from epi_kernels.repro.methods.base import token_loss
from python_tests.measure_runs import ROWS, Data, make_stage, masked, observe, train

pytestmark = pytest.mark.usefixtures("one_thread")


def plain_top_set(importance: dict[str, np.ndarray], ratio: float) -> set[tuple[str, int]]:
    """Min-max within each tensor, then sorted."""
    scored = []
    for name, u in importance.items():
        low, high = u.min(), u.max()
        scores = (u - low) / (high - low) if high > low else np.zeros_like(u)
        scored += [(float(score), name, place) for place, score in enumerate(scores.reshape(-1))]
    scored.sort(key=lambda one: -one[0])
    k = math.floor(ratio * len(scored))
    least = scored[k - 1][0] if k else math.inf
    return {(name, place) for score, name, place in scored if score >= least and score > 0}


def unpacked(masks, sizes) -> set[tuple[str, int]]:
    return {
        (name, int(place))
        for name, mask in masks.items()
        for place in torch.nonzero(unpack(mask, sizes[name])).reshape(-1)
    }


@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.3, 0.0001])
def test_the_top_set_is_a_sort(ratio):
    rng = torch.Generator().manual_seed(3)
    u = {
        name: torch.rand(n, generator=rng) ** 8 * s
        for name, n, s in [("a", 1961, 1), ("b", 7, 1e-9), ("c", 129, 1e3)]
    }
    u |= {"flat": torch.full((33,), 2.0), "one": torch.tensor([5.0]), "none": torch.empty(0)}
    expected = plain_top_set({name: value.numpy() for name, value in u.items() if value.numel()}, ratio)
    assert unpacked(top_set(u, ratio), {name: value.numel() for name, value in u.items()}) == expected


def plain_importance(stage, batches) -> dict[str, np.ndarray]:
    total = None
    for batch in batches:
        stage.model.zero_grad()
        parts = stage.recipe.accumulation
        for part in range(parts):
            rows = slice(part * ROWS // parts, (part + 1) * ROWS // parts)
            (token_loss(stage.model, batch.rows(rows)) / parts).backward()
        torch.nn.utils.clip_grad_norm_(stage.model.parameters(), stage.recipe.clip or math.inf)
        squares = {name: (param.grad * param.grad).numpy() for name, param in stage.model.named_parameters()}
        total = squares if total is None else {name: total[name] + squares[name] for name in squares}
    return {name: value / np.float32(len(batches)) for name, value in total.items()}


def plain_jaccard(first: set, second: set) -> float:
    return len(first & second) / len(first | second) if first | second else 1.0


def of_kind(found: set, kind: str) -> set:
    return found if kind == "all" else {one for one in found if kind_of(one[0]) == kind}


@pytest.mark.parametrize("recipe", [{"clip": 0.5}, {"clip": None, "accumulation": 2}], ids=str)
def test_drift(recipe):
    ratios, batches, every, steps = (0.02, 0.2), 3, 2, 5
    stage = make_stage(steps, lambda model: masked(model, mask_interval=3), dropout=0.0, **recipe)
    data, (drift,) = observe(stage, f"drift:every={every},batches={batches},ratios=0.02+0.2")
    sets, masks = {}, {}

    def look(done: int) -> None:
        held = [param.grad for param in stage.model.parameters()]
        for side in (0, 1):
            indices = range(side * batches, (side + 1) * batches)
            u = plain_importance(stage, [Data().batch(None, i, ROWS) for i in indices])
            for p in ratios:
                sets[done, p, "AB"[side]] = plain_top_set(u, p)
        for param, grad in zip(stage.model.parameters(), held):
            param.grad = grad
        masks[done] = {
            (name, int(place))
            for name, param in stage.model.named_parameters()
            for place in torch.nonzero(stage.optimizer.isolation_mask(param).reshape(-1)).reshape(-1)
        }

    look(0)
    train(stage, data, [drift], each=lambda step: look(step + 1) if step + 1 in (2, 4, 5) else None)
    record = drift.record()
    sizes = {name: param.numel() for name, param in stage.model.named_parameters()}
    elements = {
        kind: sum(n for name, n in sizes.items() if kind in ("all", kind_of(name)))
        for kind in record["elements"]
    }
    assert record["elements"] == elements
    assert set(elements) == {"all", "embedding", "q", "k", "v", "o", "gate", "up", "down", "norm"}
    for p in ratios:
        points = record["ratios"][str(p)]
        assert [point["step"] for point in points] == [0, 2, 4, 5]
        for point, before in zip(points, [None, *points]):
            at = point["step"]
            pairs = {
                "ceiling": (sets[at, p, "A"], sets[at, p, "B"]),
                "from_start": (sets[0, p, "A"], sets[at, p, "A"]),
                "from_start_other": (sets[0, p, "B"], sets[at, p, "A"]),
            }
            if before is not None:
                pairs["successive"] = (sets[before["step"], p, "A"], sets[at, p, "A"])
            assert ("successive" in point) == (before is not None)
            for what, (first, second) in pairs.items():
                expected = {
                    kind: plain_jaccard(of_kind(first, kind), of_kind(second, kind)) for kind in elements
                }
                assert point[what] == expected, (p, at, what)
            for kind, n in elements.items():
                a, b = (len(of_kind(sets[t, p, "A"], kind)) / n for t in (0, at))
                assert point["share"][kind] == b
                chance = a * b / (a + b - a * b) if a or b else 1.0
                assert point["chance"][kind] == pytest.approx(chance)
        assert points[0]["from_start"]["all"] == 1.0
        assert points[-1]["chance"]["all"] == pytest.approx(p / (2 - p), rel=0.05)
    assert [point["step"] for point in record["optimizer"]] == [4, 5]  # the first mask came after step 3
    for point in record["optimizer"]:
        assert point["from_first"]["all"] == plain_jaccard(masks[4], masks[point["step"]])
        assert point["share"]["all"] == len(masks[point["step"]]) / elements["all"]


def test_the_two_sides_have_no_batch_in_common():
    stage = make_stage(1)
    data, (drift,) = observe(stage, "drift:batches=2")
    drift.before_step(stage, 0)
    assert data.asked == [(None, index, ROWS) for index in range(4)]


def test_kinds():
    block = "model.layers.0."
    table = {
        "model.embed_tokens.weight": "embedding",
        block + "self_attn.q_proj.weight": "q",
        block + "self_attn.q_proj.bias": "q",
        block + "self_attn.k_proj.weight": "k",
        block + "self_attn.v_proj.lora_A.default.weight": "v",
        block + "self_attn.o_proj.weight": "o",
        block + "self_attn.q_norm.weight": "norm",
        block + "mlp.gate_proj.weight": "gate",
        block + "mlp.up_proj.weight": "up",
        block + "mlp.down_proj.weight": "down",
        block + "input_layernorm.weight": "norm",
        block + "pre_feedforward_layernorm.weight": "norm",  # Gemma-2
        "model.norm.weight": "norm",
        "lm_head.weight": "lm_head",
        "transformer.h.0.ln_1.bias": "norm",
        "transformer.h.0.attn.c_attn.weight": "qkv",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight": "vision",
        "model.multi_modal_projector.linear_1.weight": "projector",
        "something.else": "other",
    }
    assert {name: kind_of(name) for name in table} == table
    assert set(table.values()) <= set(ORDER)
