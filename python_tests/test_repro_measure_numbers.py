"""Each number of the observers against a plain one in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from epi_kernels.reference.bits import unpack
from epi_kernels.repro.measure import conflict as conflicts
from epi_kernels.repro.measure import cost
from epi_kernels.repro.measure.importance import top_set
from epi_kernels.repro.measure.kinds import ORDER, kind_of
from epi_kernels.repro.measure.passes import gradients
from epi_kernels.repro.methods.base import token_loss
from epi_kernels.repro.methods.published import PublishedEPI
from python_tests.measure_runs import ROWS, Data, carried, make_stage, masked, observe, train


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- importance and drift


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


# ---------------------------------------------------------------- conflict


def test_conflict_of_known_cosines():
    cosine = [[1.0, -0.5, 0.25], [-0.5, 1.0, -0.1], [0.25, -0.1, 1.0]]
    assert conflicts.conflict(cosine) == {"score": pytest.approx(20), "share": pytest.approx(200 / 3)}
    assert conflicts.conflict(cosine, 2) == {"score": pytest.approx(5), "share": 50}
    assert conflicts.cosines([[4.0, -3.0, 0.0], [-3.0, 9.0, 0.0], [0.0, 0.0, 0.0]]) == [
        [1.0, -0.5, 0.0],
        [-0.5, 1.0, 0.0],
        [0.0, 0.0, 0.0],
    ]


def test_conflict():
    stage = make_stage(5, dropout=0.0)
    data, (observer,) = observe(stage, "conflict:every=3,rows=6")
    expected = {}

    class Plain:
        def before_step(self, stage, step):
            if step not in (0, 3, 4):
                return
            params = list(stage.model.parameters())
            held = [param.grad for param in params]
            flat = []
            for task in (0, 1):
                stage.model.zero_grad()
                token_loss(stage.model, Data().batch(task, 0, 6)).backward()
                flat.append(
                    np.concatenate([param.grad.numpy().reshape(-1) for param in params]).astype(np.float64)
                )
            for param, grad in zip(params, held):
                param.grad = grad
            free = ~np.concatenate(
                [stage.optimizer.isolation_mask(param).numpy().reshape(-1) for param in params]
            )
            for of, keep in (("all", slice(None)), ("free", free)):
                a, b = flat[0][keep], flat[1][keep]
                expected[step, of] = a @ b / np.sqrt((a @ a) * (b @ b))

        def after_step(self, stage, step):
            pass

    train(stage, data, [Plain(), observer])
    record = observer.record()
    assert [point["step"] for point in record["points"]] == [0, 3, 4]
    for point in record["points"]:
        for of in ("all", "free"):
            cosine = expected[point["step"], of]
            assert point[of]["cosines"][0][1] == pytest.approx(cosine, rel=1e-9)
            assert point[of]["score"] == pytest.approx(100 * max(0, -cosine))
            assert point[of]["share"] == (100 if cosine < 0 else 0)
    assert expected[4, "all"] != expected[4, "free"]
    mean = np.mean([100 * max(0, -expected[step, "free"]) for step in (0, 3, 4)])
    assert record["mean"]["free"]["score"] == pytest.approx(mean)
    assert record["mean"]["free"]["by_task"][1]["score"] == pytest.approx(mean)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_gradient_is_of_the_mean_loss_a_token_whatever_the_micro_batches(parts):
    """As a step's: rows with long answers weigh more, and a micro-batch without any is passed over."""
    batch = Data().batch(None, 0, ROWS)
    for row, known in enumerate((2, 9, 10, 10)):
        batch.labels[row, :known] = -100
    whole, split = (make_stage(1, dropout=0.0, accumulation=count) for count in (1, parts))
    found = gradients(split, batch)
    for one, other in zip(gradients(whole, batch), found, strict=True):
        torch.testing.assert_close(one, other)
    batch.labels.fill_(-100)
    assert not any(one.any() for one in gradients(split, batch))


def test_what_epi_as_published_isolates_is_not_free():
    stage = make_stage(3, lambda model: PublishedEPI(model.parameters(), ratio=0.2), dropout=0.0)
    data, (observer,) = observe(stage, "conflict:every=1")
    for group in stage.optimizer.param_groups:
        for param in group["params"]:
            assert not stage.optimizer.isolation_mask(param).any()

    class Refreshes:
        def before_step(self, stage, step):
            pass

        def after_step(self, stage, step):
            stage.optimizer.refresh()

    train(stage, data, [observer, Refreshes()])
    first, *others = observer.record()["points"]
    assert first["all"] == first["free"] and all(one["all"] != one["free"] for one in others)


def test_one_task_has_no_conflict():
    stage = make_stage(1)
    stage.tasks = ("one",)
    data, (observer,) = observe(stage, "conflict")
    train(stage, data, [observer])
    assert observer.record() == {"tasks": ["one"]} and data.asked == []


# ---------------------------------------------------------------- stability and curve


def watched(steps: int, *names: str, start=None, **options):
    """Runs; returns the records, and by step done the weights, and by step the loss and the gradient's norm."""
    stage = make_stage(
        steps, lambda model: masked(model, **options), dropout=0.0, interval=options["mask_interval"]
    )
    if start is not None:
        start(stage)
    data, observers = observe(stage, *names)
    weights = {0: flat(stage)}
    seen, held_out = {}, {}

    def look(step: int) -> None:
        weights[step + 1] = flat(stage)
        seen[step] = (stage.loss, stage.grad_norm)
        with torch.no_grad():
            held_out[step + 1] = float(token_loss(stage.model.eval(), Data().validation(ROWS)))
        stage.model.train()

    train(stage, data, observers, each=look)
    return [one.record() for one in observers], weights, seen, held_out


def flat(stage) -> np.ndarray:
    return np.concatenate([param.detach().numpy().reshape(-1) for param in stage.model.parameters()]).astype(
        np.float64
    )


def test_stability():
    (record,), weights, seen, held_out = watched(27, "stability:window=5", mask_interval=8)
    half = 2  # a quarter of the interval
    assert [(one["step"], one["kind"]) for one in record["events"]] == [
        (8, "refresh"),
        (12, "placebo"),
        (16, "refresh"),
        (20, "placebo"),
        (24, "refresh"),
    ]
    inside = {
        step for one in record["events"] for step in range(one["step"] - half + 1, one["step"] + half + 1)
    }
    assert {row["step"] for row in record["rows"]} == inside | {27}  # the placebo at 28 is not reached

    plain = {
        step: {
            "update": float(np.linalg.norm(weights[step] - weights[step - 1])),
            "validation": held_out[step],
            "loss": seen[step][0],
            "grad_norm": seen[step][1],
        }
        for step in inside
    }
    for row in record["rows"][:-1]:
        expected = plain[row["step"]]
        assert row["update"] == pytest.approx(expected["update"], rel=1e-4)
        assert row["validation"] == pytest.approx(expected["validation"], rel=1e-6)
        assert (row["loss"], row["grad_norm"]) == (expected["loss"], expected["grad_norm"])
    ratios = {"refresh": [], "placebo": []}
    for one in record["events"]:
        at = one["step"]
        assert one["half"] == half
        for name in ("loss", "validation", "grad_norm", "update"):
            before = np.mean([plain[at - 1][name], plain[at][name]])
            after = np.mean([plain[at + 1][name], plain[at + 2][name]])
            assert one["before"][name] == pytest.approx(before, rel=1e-4)
            assert one["after"][name] == pytest.approx(after, rel=1e-4)
            assert one["ratio"][name] == pytest.approx(after / before, rel=1e-4)
        ratios[one["kind"]].append(one["ratio"]["update"])
    for kind, values in ratios.items():
        assert record["mean"][kind]["n"] == len(values)
        assert record["mean"][kind]["update"] == pytest.approx(np.mean(values))


def test_windows_the_stage_does_not_hold_are_left_out():
    # the refresh after step 8 has one row less than it needs after it
    (record,), *_ = watched(10, "stability:window=2", mask_interval=8)
    assert record["events"] == [] and record["mean"]["refresh"] == {"n": 0} | dict.fromkeys(
        ("loss", "validation", "grad_norm", "update")
    )
    assert [row["step"] for row in record["rows"]] == [7, 8, 9, 10]


def test_carried_importance_is_seen_before_the_first_step():
    (curve, stability), *_ = watched(12, "curve:every=5", "stability", start=carried, mask_interval=4)
    assert [one["step"] for one in curve["refreshes"]] == [0, 4, 8, 12]
    assert [one["step"] for one in curve["points"]] == [0, 5, 10, 11]
    assert [(one["step"], one["kind"]) for one in stability["events"]] == [
        (2, "placebo"),
        (4, "refresh"),
        (6, "placebo"),
        (8, "refresh"),
        (10, "placebo"),
    ]


def test_the_curve():
    reports = {}
    stage = make_stage(7, lambda model: masked(model, mask_interval=3))
    data, (curve,) = observe(stage, "curve:every=2")
    stage.optimizer.param_groups[0]["lr"] = 0.25
    seen = {}

    def look(step: int) -> None:
        seen[step] = (stage.loss, stage.grad_norm)
        if step in (2, 5):
            reports[step + 1] = stage.optimizer.isolation_report()

    train(stage, data, [curve], each=look)
    record = curve.record()
    assert record["points"] == [
        {"step": step, "loss": seen[step][0], "grad_norm": seen[step][1], "lr": 0.25} for step in (0, 2, 4, 6)
    ]
    assert [one["step"] for one in record["refreshes"]] == [3, 6]
    elements = sum(param.numel() for param in stage.model.parameters())
    for one in record["refreshes"]:
        report = reports[one["step"]]
        assert one["share"] == report.isolated / elements
        for name in ("jaccard", "entered", "released", "interval"):
            assert one[name] == getattr(report, name)
        assert one["layers"] == {layer.name: layer.isolated / layer.elements for layer in report.layers}


# ---------------------------------------------------------------- cost


def test_step_times(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    timer = cost.StepTimer(torch.device("cpu"))
    updates, gradients = [1000, 1000, 1000, 5, 1, 4, 2, 3], [900, 900, 900, 10, 20, 30, 40, 50]
    for index, (update, gradient) in enumerate(zip(updates, gradients)):
        if index == cost.SKIPPED:
            assert timer.result() is None
        with timer.gradient():
            now[0] += gradient / 1e3
        now[0] += 7.0  # an observer at work
        with timer.update():
            now[0] += update / 1e3
    found = timer.result()
    assert found.steps == 5
    expected = np.percentile(updates[3:], [20, 50, 80])
    assert [found.optimizer_p20, found.optimizer_p50, found.optimizer_p80] == pytest.approx(list(expected))
    assert found.training_p50 == pytest.approx(np.median(np.add(updates[3:], gradients[3:])))
    again = cost.StepTimer(torch.device("cpu"))
    again.load_state_dict(timer.state_dict())
    assert again.result() == found


def test_peak_memory():
    size = 96 << 20
    with cost.PeakMemory(torch.device("cpu")) as first:
        held = torch.ones(size, dtype=torch.uint8)
        del held
    with cost.PeakMemory(torch.device("cpu"), at_least=123 << 40) as second:
        pass
    assert second.bytes == 123 << 40
    with cost.PeakMemory(torch.device("cpu")) as third:
        pass
    if first.of == "process":
        assert first.before is not None and first.bytes - first.before > 0.9 * size
        assert third.bytes < first.bytes
    else:
        assert first.of == "process since its start" and first.bytes >= size


def test_bytes():
    stage = make_stage(1)
    data, _ = observe(stage)
    train(stage, data, [])
    found = cost.stage_bytes(stage)
    own = stage.optimizer.state_bytes()
    elements = sum(param.numel() for param in stage.model.parameters())
    assert (found.parameters, found.weights) == (elements, 4 * elements)
    assert found.optimizer == own | {"anchor": 12, "other": own["other"] + 1, "total": own["total"] + 13}
    assert found.peak is None
