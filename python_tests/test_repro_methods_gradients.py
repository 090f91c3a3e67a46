"""Methods of the harness that change gradients, updates or what trains: against their equations in numpy."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from epi_kernels.finetune.train import step_seed
from epi_kernels.optim import exchange
from epi_kernels.repro.methods import config as configs
from epi_kernels.repro.methods import pcgrad
from epi_kernels.repro.methods.base import token_loss
from epi_kernels.repro.methods.mofo import MoFO
from epi_kernels.repro.methods.pcgrad import surgery
from python_tests.methods_runs import (
    begin,
    made_folders,
    make_batch,
    make_stage,
    same_bits,
    train,
    weights_of,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    yield from made_folders(tmp_path_factory)


# ---------------------------------------------------------------- penalties


def penalty_gradient(method, fisher, anchor) -> dict[str, torch.Tensor]:
    """By autograd, of 0.5 * strength * sum F (w - w0)^2 in float64."""
    params = {name: p.detach().double().requires_grad_() for name, p in method.stage.model.named_parameters()}
    terms = [(fisher[name] * (param - anchor[name].double()) ** 2).sum() for name, param in params.items()]
    loss = 0.5 * method.config.strength * torch.stack(terms).sum()
    return dict(zip(params, torch.autograd.grad(loss, list(params.values()))))


@pytest.mark.parametrize(
    "config", [configs.Ewc(strength=0.7), configs.L2Sp(strength=0.7)], ids=lambda c: c.name
)
def test_penalties_add_the_gradient_of_their_equation(folders, config):
    method = begin(config, make_stage(folders))
    model = method.stage.model
    anchor = weights_of(model)
    fisher = {name: torch.ones_like(param) for name, param in model.named_parameters()}
    if config.name == "ewc":
        saved = exchange.read(folders.before / "isolation.safetensors").parameters
        mean = {name: one.importance.double() / (1 - one.beta**one.step) for name, one in saved.items()}
        scale = torch.cat([one.flatten() for one in mean.values()]).mean()
        fisher = {name: one / scale for name, one in mean.items()}
        assert method.extra_bytes() == dict.fromkeys(["anchor", "fisher"], 4 * model.num_parameters())
    else:
        assert method.extra_bytes() == {"anchor": 4 * model.num_parameters()}
    train(method, range(2))  # away from the anchor
    wanted = penalty_gradient(method, fisher, anchor)

    batch = make_batch(7)
    method.optimizer.zero_grad()
    loss = token_loss(model, batch)
    plain = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))))
    reported = method.backward(batch, 0.25), method.backward(batch, 0.75)  # weights that add up to 1
    method.gather()
    assert reported == pytest.approx([float(loss.detach())] * 2)
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, plain[name] + wanted[name].float(), rtol=1e-4, atol=1e-6)
        assert wanted[name].any()


def test_a_stronger_pull_stays_closer(folders):
    distances = []
    for strength in (1e-4, 1.0, 100.0):
        method = begin(configs.Ewc(strength=strength), make_stage(folders))
        start = weights_of(method.stage.model)
        train(method, range(12))
        moved = [((weights_of(method.stage.model)[key] - one) ** 2).sum() for key, one in start.items()]
        distances.append(float(torch.stack(moved).sum()))
    assert distances == sorted(distances, reverse=True)


# ---------------------------------------------------------------- PCGrad


def surgery_in_numpy(gradients: list[np.ndarray], order: random.Random) -> np.ndarray:
    """Algorithm 1 of arXiv 2001.06782."""
    total = np.zeros_like(gradients[0])
    for i, own in enumerate(gradients):
        projected = own.copy()
        others = [j for j in range(len(gradients)) if j != i]
        order.shuffle(others)
        for j in others:
            along = projected @ gradients[j]
            if along < 0:
                projected -= along / (gradients[j] @ gradients[j]) * gradients[j]
        total += projected
    return total


@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_surgery_is_the_paper_s(tasks):
    rng = np.random.default_rng(tasks)
    gradients = [rng.standard_normal(30) for _ in range(tasks)]
    if tasks > 1:
        gradients[1] -= gradients[0]  # they conflict
    split = [
        [torch.tensor(g[:12], dtype=torch.float32).view(3, 4), torch.tensor(g[12:], dtype=torch.float32)]
        for g in gradients
    ]
    for seed in range(5):
        wanted = surgery_in_numpy(gradients, random.Random(seed))
        found = torch.cat([one.flatten() for one in surgery(split, random.Random(seed))])
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert tasks == 1 or not np.allclose(wanted, sum(gradients))
    np.testing.assert_array_equal(split[0][1].numpy(), gradients[0][12:].astype(np.float32))  # as they were


def test_gradients_that_agree_are_added():
    agreeing = [[torch.tensor([1.0, 2.0])], [torch.tensor([0.5, 0.0])], [torch.tensor([0.0, 3.0])]]
    assert surgery(agreeing, random.Random(0))[0].tolist() == [1.5, 5.0]


def test_pcgrad_takes_one_gradient_a_task_over_all_micro_batches(folders):
    method = begin(configs.PcGrad(), make_stage(folders, tasks=("a", "b", "c")))
    model = method.stage.model
    params = list(model.parameters())
    batch = make_batch(0, tasks=(0, 1, 2))
    parts = [slice(0, 3), slice(3, 6)]
    gradients, losses = [], []
    for task in range(3):
        total = [torch.zeros_like(param) for param in params]
        for part in parts:
            small = batch.rows(part)
            rows = small.rows(small.task == task)
            share = (rows.labels[:, 1:] != -100).sum() / (small.labels[:, 1:] != -100).sum()
            for one, more in zip(total, torch.autograd.grad(token_loss(model, rows) * share * 0.5, params)):
                one += more
        gradients.append(torch.cat([one.flatten() for one in total]).double().numpy())
    plain = [torch.zeros_like(param) for param in params]
    for part in parts:
        loss = token_loss(model, batch.rows(part))
        losses.append(float(loss.detach()))
        for one, more in zip(plain, torch.autograd.grad(loss * 0.5, params)):
            one += more
    np.testing.assert_allclose(
        sum(gradients), torch.cat([one.flatten() for one in plain]).numpy(), rtol=1e-3, atol=1e-6
    )

    assert [method.backward(batch.rows(part), 0.5) for part in parts] == pytest.approx(losses)
    method.gather()
    order = {id(param): i for i, param in enumerate(params)}
    found = [None] * len(params)
    for param in method._params:
        found[order[id(param)]] = param.grad.flatten()
    wanted = surgery_in_numpy(gradients, random.Random(step_seed(3, 0)))
    np.testing.assert_allclose(torch.cat(found).numpy(), wanted, rtol=1e-3, atol=1e-6)


def test_pcgrad_goes_on_in_the_order_of_the_step_it_stopped_at(folders, monkeypatch):
    orders = []
    monkeypatch.setattr(
        pcgrad, "surgery", lambda gradients, order: orders.append(order.random()) or gradients[0]
    )
    whole, resumed = (begin(configs.PcGrad(), make_stage(folders)) for _ in range(2))
    train(whole, range(3))
    resumed.load_state_dict({"step": 2})
    train(resumed, range(2, 3))
    assert len(orders) == 4 and orders[2] == orders[3]  # once a step
    assert len(set(orders)) == 3


def test_pcgrad_of_one_task_is_plain_and_the_replayed_are_another(folders):
    alone, plain = (
        begin(configs.PcGrad(share=0.2), make_stage(folders)),
        begin(configs.Full(), make_stage(folders)),
    )
    assert (alone.replay, plain.replay) == (0.2, 0.0)
    assert begin(configs.PcGrad(), make_stage(folders, tasks=("a", "b"))).replay == 0.0
    assert begin(configs.Replay(share=0.05), make_stage(folders)).replay == 0.05
    for method in (alone, plain):
        train(method, range(2))
    assert all(
        same_bits(a, b) for a, b in zip(alone.stage.model.parameters(), plain.stage.model.parameters())
    )
    assert alone.extra_bytes() == {"task_gradients": 2 * 4 * alone.stage.model.num_parameters()}

    batch = make_batch(0, tasks=(0, -1))
    alone.backward(batch, 1.0)
    assert sorted(alone._gradients) == [-1, 0]
    empty = batch._replace(labels=torch.where(batch.task[:, None] == -1, -100, batch.labels))
    alone.step(2)
    assert np.isfinite(alone.backward(empty, 1.0)) and sorted(alone._gradients) == [0]


# ---------------------------------------------------------------- MoFO


def test_mofo_is_a_step_of_adamw_where_momentum_is_largest():
    rng = np.random.default_rng(0)
    lr, (b1, b2), eps, decay, fraction = 0.1, (0.9, 0.99), 1e-8, 0.2, 0.25
    start = [rng.standard_normal((5, 5)), rng.standard_normal(3)]
    params = [torch.nn.Parameter(torch.tensor(one, dtype=torch.float32)) for one in start]
    optimizer = MoFO(params, lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay, fraction=fraction)
    weights = [one.copy() for one in start]
    m, v = [np.zeros_like(one) for one in start], [np.zeros_like(one) for one in start]
    for t in range(1, 5):
        for i, param in enumerate(params):
            g = rng.standard_normal(start[i].shape)
            param.grad = torch.tensor(g, dtype=torch.float32)
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            k = max(1, int(fraction * g.size))
            moves = np.abs(m[i]) >= np.sort(np.abs(m[i]).ravel())[-k]
            update = m[i] / (1 - b1**t) / (np.sqrt(v[i] / (1 - b2**t)) + eps) + decay * weights[i]
            assert moves.sum() == (6, 1)[i]
            weights[i] = np.where(moves, weights[i] - lr * update, weights[i])
        before = [param.detach().clone() for param in params]
        optimizer.step()
        assert [int((p != old).sum()) for p, old in zip(params, before)] == [6, 1]
    for param, wanted in zip(params, weights):
        np.testing.assert_allclose(param.detach().numpy(), wanted, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- LoRA


def test_lora_trains_adapters_alone_and_leaves_a_plain_model(folders):
    stage = make_stage(folders)
    base = weights_of(stage.model)
    names = {name for name, module in stage.model.named_modules() if isinstance(module, torch.nn.Linear)} - {
        "lm_head"
    }
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    method = begin(configs.Lora(rank=2, alpha=6.0), stage)
    assert torch.equal(before, torch.random.get_rng_state())  # other draws are as without it
    batch = make_batch(0)
    plain = float(token_loss(make_stage(folders).model, batch).detach())
    assert float(token_loss(stage.model, batch).detach()) == pytest.approx(plain)  # nothing changed yet

    train(method, range(3))
    held = {p for group in method.optimizer.param_groups for p in group["params"]}
    adapters = {name: p.detach().clone() for name, p in stage.model.named_parameters() if p.requires_grad}
    assert len(held) == len(adapters) == 2 * len(names) and all("lora_" in name for name in adapters)
    count = sum(p.numel() for p in adapters.values())
    moments = sum(s[key].nbytes for s in method.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert moments == 2 * 4 * count and method.extra_bytes() == {"adapters": 4 * count}

    model = method.finish()
    assert method.extra_bytes() == {"adapters": 4 * count}
    assert model is stage.model and all(param.requires_grad for param in model.parameters())
    after = weights_of(model)
    assert after.keys() == base.keys()
    for key, weight in base.items():
        module = key.removesuffix(".weight")
        if module not in names:
            assert same_bits(after[key], weight)
            continue
        a, b = (adapters[f"base_model.model.{module}.lora_{x}.default.weight"] for x in "AB")
        assert b.any()
        torch.testing.assert_close(after[key], weight + (6.0 / 2) * b @ a)


def test_lora_begins_the_same_for_a_seed(folders):
    drawn = []
    for seed in (3, 3, 4):
        method = begin(configs.Lora(rank=2), make_stage(folders, seed=seed))
        drawn.append(
            torch.cat([p.detach().flatten() for g in method.optimizer.param_groups for p in g["params"]])
        )
        torch.rand(1)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
