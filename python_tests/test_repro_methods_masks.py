"""What the harness's masking methods isolate: against sorts, shares and counts in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from epi_kernels.repro.methods import config as configs
from epi_kernels.repro.methods.selection import lowest, random_masks
from python_tests.methods_runs import (
    MASKING,
    P,
    begin,
    counted,
    elements,
    largest,
    made_folders,
    make_stage,
    masks_of,
    same_bits,
    saved_importance,
    scaled,
    train,
    weights_of,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    yield from made_folders(tmp_path_factory)


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
