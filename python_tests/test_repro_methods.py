"""Methods of the harness: every one by its config, stopped and resumed, and what masks isolate."""

from __future__ import annotations

import ast
import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from epi_kernels import MaskedEMAAdamW
from epi_kernels.optim import exchange
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.methods import METHODS, make_method
from epi_kernels.repro.methods import config as configs
from epi_kernels.repro.methods.published import PublishedEPI
from epi_kernels.repro.methods.selection import lowest, random_masks
from python_tests.methods_runs import (
    RECIPE,
    begin,
    largest,
    made_folders,
    make_stage,
    same_bits,
    scaled,
    stop_and_resume,
    train,
    weights_of,
)
from python_tests.test_imports import PACKAGE, imports


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    yield from made_folders(tmp_path_factory)


P = 0.1
MASKING = {
    "epi": configs.Epi(ratio=P, interval=2),
    "epi-own-importance": configs.Epi(
        ratio=P, interval=2, importance_beta=0.9, by_block=True, hysteresis=0.1
    ),
    "epi-cold": configs.Epi(ratio=P, interval=1, carry=False, normalization="none", scope="layer"),
    "epi-core": configs.Epi(ratio=P, interval=2, core=0.05),
    "epi-adaptive": configs.Epi(ratio=P, interval=1, adaptive=True, state_dtype="bfloat16"),
    "published": configs.PublishedEpi(ratio=P, interval=2),
    "window": configs.Window(ratio=P, interval=2, window=3),
    "static-g2": configs.Static(ratio=P),
    "static-delta": configs.Static(by="delta", ratio=P, carry=False),
    "random": configs.RandomMask(ratio=P, interval=2),
    "inverted": configs.Inverted(ratio=P, interval=2),
}
OTHERS = {
    "full": configs.Full(),
    "full-epi": configs.Full(optimizer="epi"),
    "full-moments": configs.Full(optimizer="epi", keep_moments=True),
    "ewc": configs.Ewc(strength=0.5),
    "l2sp": configs.L2Sp(strength=0.5),
    "replay": configs.Replay(share=0.2),
    "lora": configs.Lora(rank=2),
    "mofo": configs.Mofo(fraction=0.2),
    "pcgrad": configs.PcGrad(share=0.2),
}


def masks_of(method) -> dict[str, torch.Tensor]:
    optimizer = method.optimizer
    found = {}
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            if isinstance(optimizer, PublishedEPI):
                state = optimizer.state[param]
                found[name] = (
                    state["isolation_mask"].clone() if state else torch.zeros_like(param, dtype=torch.bool)
                )
            else:
                found[name] = optimizer.isolation_mask(param)
    return found


def counted(masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def elements(method) -> int:
    return sum(param.numel() for group in method.optimizer.param_groups for param in group["params"])


def saved_importance(folders) -> dict[str, torch.Tensor]:
    saved = exchange.read(folders.before / "isolation.safetensors").parameters
    return {name: one.importance.clone() for name, one in saved.items()}


def test_every_config_has_a_method(folders):
    schema = TypeAdapter(configs.Method).json_schema()
    assert set(schema["discriminator"]["mapping"]) == set(METHODS)
    assert {config.name for config in [*MASKING.values(), *OTHERS.values()]} == set(METHODS)


def test_the_benchmark_gets_published_epi_without_the_harness():
    for name in ("__init__", "plain", "published"):
        path = PACKAGE / "repro" / "methods" / f"{name}.py"
        runtime = ast.parse(path.read_text().replace("if TYPE_CHECKING:", "def _():")).body
        ours = {node.module for node in runtime if isinstance(node, ast.ImportFrom) and node.level}
        others = {name for _, name in imports(path)}
        assert ours <= {"plain"} and not any(one.startswith("pydantic") for one in others), path


@pytest.mark.parametrize("name", [*MASKING, *OTHERS])
def test_a_stopped_stage_goes_on_as_if_it_had_not_stopped(folders, name):
    config = (MASKING | OTHERS)[name]
    tasks = (0, 1, -1)  # in what order PCGrad projects makes a difference
    whole = begin(config, make_stage(folders))
    train(whole, range(5), tasks=tasks)
    part = begin(config, make_stage(folders))
    train(part, range(3), tasks=tasks)
    resumed = stop_and_resume(part, config, make_stage(folders))
    train(resumed, range(3, 5), tasks=tasks)
    wanted, found = weights_of(whole.finish()), weights_of(resumed.finish())
    start = weights_of(make_stage(folders).model)
    assert wanted.keys() == found.keys() == start.keys()
    assert all(same_bits(wanted[key], found[key]) for key in wanted)
    assert any(not same_bits(wanted[key], start[key]) for key in wanted)
    assert whole.extra_bytes() == resumed.extra_bytes()


@pytest.mark.parametrize("name", MASKING)
def test_isolated_weights_keep_their_bits(folders, name):
    method = begin(MASKING[name], make_stage(folders))
    model, seen = method.stage.model, []
    before = {"masks": masks_of(method), "weights": weights_of(model)}

    def check(step):
        now = weights_of(model)
        for key, mask in before["masks"].items():
            assert same_bits(now[key][mask], before["weights"][key][mask]), (step, key)
            assert (now[key][~mask] != before["weights"][key][~mask]).any() or mask.all()
        seen.append(counted(before["masks"]))
        before.update(masks=masks_of(method), weights=now)

    train(method, range(5), after=check)
    carried = getattr(MASKING[name], "carry", True) or name.startswith("static")
    assert all(count > 0 for count in (seen if carried else seen[1:]))
    if not carried:
        assert seen[0] == 0


@pytest.mark.parametrize("name", ["epi", "published", "window", "static-g2"])
def test_carried_importance_isolates_from_the_first_step(folders, name):
    method = begin(MASKING[name], make_stage(folders))
    k = math.floor(P * elements(method))
    wanted = largest({key: scaled(u) for key, u in saved_importance(folders).items()}, k)
    for key, mask in masks_of(method).items():
        assert np.array_equal(mask.numpy().ravel(), wanted[key]), key
    assert counted(masks_of(method)) >= k > 0


def test_without_carry_nothing_is_isolated_before_the_first_refresh(folders):
    stage = make_stage(folders, before=folders.without)  # nothing there to carry
    for config in (
        configs.PublishedEpi(ratio=P, interval=2, carry=False),
        configs.Inverted(ratio=P, interval=2, carry=False),
        configs.Window(ratio=P, interval=2, carry=False),
    ):
        method = begin(config, stage)
        counts = [counted(masks_of(method))]
        for step in range(2):
            train(method, range(step, step + 1))
            counts.append(counted(masks_of(method)))
        assert counts[:2] == [0, 0] and counts[2] >= math.floor(P * elements(method)), config


def test_a_core_lasts_and_the_evolving_mask_is_selected_beside_it(folders):
    config = MASKING["epi-core"]
    method = begin(config, make_stage(folders))
    n, importance = elements(method), saved_importance(folders)
    scores = {key: scaled(u) for key, u in importance.items()}
    core = largest(scores, math.floor(config.core * n))
    names = [name for group in method.optimizer.param_groups for name in group["param_names"]]

    def check(step):
        masks = masks_of(method)
        assert all(masks[key].numpy().ravel()[core[key]].all() for key in names)
        if (step + 1) % config.interval == 0:
            u = {
                name: method.optimizer.state[param]["exp_avg_sq"]
                for group in method.optimizer.param_groups
                for name, param in zip(group["param_names"], group["params"], strict=True)
            }
            evolving = largest({key: scaled(one) for key, one in u.items()}, math.floor(P * n))
            for key in names:
                assert np.array_equal(masks[key].numpy().ravel(), evolving[key] | core[key])

    train(method, range(4), after=check)
    assert method.optimizer.state_bytes()["persistent_mask"] > 0


def test_adaptive_takes_the_schedules(folders):
    # a fast average drifts
    method = begin(MASKING["epi-adaptive"].model_copy(update={"importance_beta": 0.2}), make_stage(folders))
    ratios = set()
    train(method, range(8), after=lambda step: ratios.add(method.optimizer.isolation_report().ratio))
    assert len(ratios) > 1 and P in ratios
    assert method.optimizer.state_bytes()["exp_avg_sq"] == 2 * elements(method)


def test_a_random_mask_has_exactly_its_share_and_changes_with_the_interval(folders):
    method = begin(MASKING["random"], make_stage(folders))
    drawn = [masks_of(method)]
    train(method, range(4), after=lambda step: drawn.append(masks_of(method)))
    assert {counted(masks) for masks in drawn} == {math.floor(P * elements(method))}
    differs = [any((a[key] != b[key]).any() for key in a) for a, b in zip(drawn, drawn[1:])]
    assert differs == [False, True, False, True]
    other = begin(MASKING["random"], make_stage(folders, seed=4))
    assert any((masks_of(other)[key] != drawn[0][key]).any() for key in drawn[0])


def test_random_masks_reach_every_element_alike():
    params = [torch.empty(3), torch.empty(0), torch.empty(2, 2), torch.empty(())]
    times = sum(
        torch.cat([mask.flatten() for mask in random_masks(params, 3, seed)]).int() for seed in range(4000)
    )
    assert times.shape == (8,) and int(times.sum()) == 3 * 4000
    assert (times - 1500).abs().max() < 150  # 5 standard deviations of a binomial at 3/8
    assert all(mask.all() for mask in random_masks(params, 8, 0))
    assert not any(mask.any() for mask in random_masks(params, 0, 0))


def test_inverted_isolates_the_lowest_scores_as_many_as_epi(folders):
    epi = begin(configs.Epi(ratio=P, interval=2), make_stage(folders))
    inverted = begin(MASKING["inverted"], make_stage(folders))
    assert counted(masks_of(inverted)) == counted(masks_of(epi))
    scores = {key: scaled(u) for key, u in saved_importance(folders).items()}
    masks = {key: mask.numpy().ravel() for key, mask in masks_of(inverted).items()}
    highest = max(scores[key][masks[key]].max() for key in masks if masks[key].any())
    assert highest <= min(scores[key][~masks[key]].min() for key in masks if not masks[key].all())

    before = masks_of(inverted)
    train(inverted, range(2))
    report = inverted.optimizer.isolation_report()
    assert report.step == 2 and counted(masks_of(inverted)) == report.isolated
    assert any((masks_of(inverted)[key] != before[key]).any() for key in before)


def test_lowest_draws_among_ties():
    importance = [
        torch.tensor([0.0, 0.0, 0.0, 1.0]),
        torch.empty(0),
        torch.full((2, 2), 5.0),
    ]  # 7 scores of 0
    draws = [lowest(importance, 3, seed) for seed in range(20)]
    for masks in draws:
        assert [mask.shape for mask in masks] == [u.shape for u in importance]
        assert sum(int(mask.sum()) for mask in masks) == 3 and not masks[0][3]
    assert len({tuple(torch.cat([m.flatten() for m in masks]).tolist()) for masks in draws}) > 5
    assert sum(int(mask.sum()) for mask in lowest(importance, 8, 0)) == 8
    assert not any(mask.any() for mask in lowest(importance, 0, 0))


def test_static_by_delta_is_the_core_of_the_stage_before(folders):
    method = begin(MASKING["static-delta"], make_stage(folders))
    start, origin = weights_of(method.stage.model), make_stage(folders, before=folders.origin).model
    moved = {
        name: (start[name] - param).abs().detach().numpy().ravel()
        for name, param in origin.named_parameters()
    }
    wanted = largest(moved, math.floor(P * elements(method)))
    train(method, range(2))
    for key, mask in masks_of(method).items():
        assert np.array_equal(mask.numpy().ravel(), wanted[key]), key
    assert method.optimizer.isolation_report() is None  # never refreshed


def test_a_window_is_the_mean_of_its_last_squared_gradients(folders):
    method = begin(configs.Window(ratio=P, interval=4, window=3), make_stage(folders))
    named = dict(method.stage.model.named_parameters())
    seen = []

    def check(step):
        seen.append({name: param.grad.clone() for name, param in named.items()})

    train(method, range(4), after=check)
    mean = {name: torch.stack([one[name] ** 2 for one in seen[1:]]) for name in named}
    # in the order of the ring: step 3 lies where step 0 was
    mean = {name: torch.stack([one[2], one[0], one[1]]).mean(0) for name, one in mean.items()}
    wanted = largest({name: scaled(one) for name, one in mean.items()}, math.floor(P * elements(method)))
    for key, mask in masks_of(method).items():
        assert np.array_equal(mask.numpy().ravel(), wanted[key]), key
    assert method.extra_bytes() == {"window": 3 * 4 * elements(method)}


def test_full_by_either_optimizer_is_adamw(folders):
    models = []
    for config in (configs.Full(), configs.Full(optimizer="epi")):
        method = begin(config, make_stage(folders))
        train(method, range(3))
        models.append(method.finish())
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_kept_moments_go_on_without_a_mask(folders):
    method = begin(OTHERS["full-moments"], make_stage(folders))
    for group in method.optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            state = method.optimizer.state[param]
            assert torch.equal(state["exp_avg_sq"], saved_importance(folders)[name])
            assert float(state["step"]) == RECIPE.steps and not state["exp_avg"].any()
    assert counted(masks_of(method)) == 0
    with pytest.raises(ValidationError, match='needs optimizer "epi"'):
        configs.Full(keep_moments=True)


def test_published_epi_starts_from_what_was_carried_and_keeps_its_dtypes(folders):
    method = begin(MASKING["published"], make_stage(folders))
    for group in method.optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            state = method.optimizer.state[param]
            assert state["step"] == 0 and not state["exp_avg_sq"].any()
            assert torch.equal(state["importance"], saved_importance(folders)[name])

    param = torch.nn.Parameter(torch.randn(40, dtype=torch.bfloat16))
    param.grad = torch.randn(40, dtype=torch.bfloat16)
    first, second = PublishedEPI([param], ratio=0.1), PublishedEPI([param], ratio=0.1)
    first.step()
    first.refresh()
    second.load_state_dict(first.state_dict())
    for key, value in first.state[param].items():
        other = second.state[param][key]
        assert other == value if key == "step" else other.dtype == value.dtype and torch.equal(other, value)


def test_published_epi_passes_over_tensors_whose_importances_are_equal():
    params = [torch.nn.Parameter(torch.zeros(20)) for _ in range(2)]
    epi = PublishedEPI(params, ratio=0.1)
    params[0].grad, params[1].grad = torch.arange(20.0), torch.ones(20)
    epi.step()
    epi.refresh()
    assert epi.state[params[0]]["isolation_mask"].tolist() == [False] * 16 + [True] * 4
    assert not epi.state[params[1]]["isolation_mask"].any()
    none = PublishedEPI(params, ratio=0.001)  # less than an element
    none.step()
    none.refresh()
    assert not any(none.state[param]["isolation_mask"].any() for param in params)


CARRIES = ["epi", "published", "window", "static-g2", "random", "inverted", "full-moments", "ewc"]


@pytest.mark.parametrize("name", CARRIES)
def test_a_run_before_that_kept_no_importance_is_named(folders, name):
    stage = make_stage(folders, before=folders.without)
    with pytest.raises(ReproError, match=r"without has no isolation.safetensors.*\"optimizer\": \"epi\""):
        make_method((MASKING | OTHERS)[name], stage)
    stage.before = None
    with pytest.raises(ReproError, match="there is no run before this stage"):
        make_method((MASKING | OTHERS)[name], stage)


def test_the_importance_of_another_model_is_refused(folders):
    stage = make_stage(folders)
    stage.model.resize_token_embeddings(26)
    for config in (configs.Epi(), configs.Ewc(), configs.PublishedEpi()):
        with pytest.raises(ReproError, match="of another model.*embed_tokens"):
            make_method(config, stage)
    (folders.without / "isolation.safetensors").write_bytes(b"damaged")
    try:
        for config in (configs.Epi(), configs.Ewc()):
            with pytest.raises(ReproError, match="no whole safetensors file"):
                make_method(config, make_stage(folders, before=folders.without))
    finally:
        (folders.without / "isolation.safetensors").unlink()


def test_a_core_by_delta_needs_two_runs_of_one_model(folders, tmp_path):
    stage = make_stage(folders)
    stage.origin = None
    with pytest.raises(ReproError, match="static by delta: needs a stage before"):
        make_method(MASKING["static-delta"], stage)
    stage.origin = tmp_path
    with pytest.raises(ReproError, match="static by delta: .*holds no model.safetensors"):
        make_method(MASKING["static-delta"], stage)


def test_masking_methods_own_what_they_say(folders):
    for name, config in MASKING.items():
        method = begin(config, make_stage(folders))
        assert isinstance(method.optimizer, PublishedEPI if name == "published" else MaskedEMAAdamW)
        assert set(method.extra_bytes()) == ({"window"} if name == "window" else set())


# ---------------------------------------------------------------- bfloat16 weights and 8-bit states


def low(folders, **changes):
    stage = make_stage(folders)
    stage.model.bfloat16()
    stage.recipe = RECIPE.model_copy(update=changes)
    return stage


def test_over_bfloat16_weights_small_steps_move_every_method_that_is_adamw(folders):
    """A step of 1e-5 is under half a unit in the last place of most weights: rounded to nearest it would be lost."""
    for config in (
        configs.Full(),
        configs.Ewc(strength=0.5),
        configs.L2Sp(strength=0.5),
        configs.Replay(share=0.2),
    ):
        stage = low(folders, lr=1e-5)
        start = weights_of(stage.model)
        method = begin(config, stage)
        assert isinstance(method.optimizer, MaskedEMAAdamW)
        train(method, range(2))
        name = "model.layers.0.mlp.up_proj.weight"
        moved = (weights_of(method.finish())[name] != start[name]).float().mean()
        assert moved > 0.01, config.name
    assert isinstance(begin(configs.Full(), make_stage(folders)).optimizer, torch.optim.AdamW)


def test_states_are_of_the_recipes_dtype_and_resume(folders):
    for name in ("full-moments", "epi", "static-g2", "random", "window"):
        config = (MASKING | OTHERS)[name]
        whole = begin(config, low(folders, state_dtype="int8"))
        assert whole.optimizer._config.state_dtype == torch.uint8, name
        train(whole, range(4))
        part = begin(config, low(folders, state_dtype="int8"))
        train(part, range(2))
        resumed = stop_and_resume(part, config, low(folders, state_dtype="int8"))
        train(resumed, range(2, 4))
        wanted, found = weights_of(whole.finish()), weights_of(resumed.finish())
        assert all(same_bits(wanted[key], found[key]) for key in wanted), name
    own = begin(configs.Epi(ratio=P, state_dtype="bfloat16"), low(folders, state_dtype="int8"))
    assert own.optimizer._config.state_dtype == torch.bfloat16
    # its scores are read from the state as it is
    assert begin(MASKING["inverted"], low(folders, state_dtype="int8")).optimizer._config.state_dtype is None
