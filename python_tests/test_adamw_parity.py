"""torch.optim.AdamW's behaviour where isolation plays no part (guarantee 2)."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch

from epi_kernels import MaskedEMAAdamW
from python_tests.adamw_steps import steps_from_one_state
from python_tests.harness import Target, give_gradients, make, small_model, train

# One step from the same state: the largest difference allowed, as a share of the tensor's norm.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}

HYPER = [
    {},
    {"lr": 0.1, "weight_decay": 0.5},
    {"weight_decay": 0.0, "eps": 1e-3},
    {"betas": (0.0, 0.5), "maximize": True},
    {"betas": (0.99, 0.9999), "eps": 0.0},
]


@pytest.mark.parametrize("hyper", HYPER, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_one_step_from_the_same_state(dtype: torch.dtype, hyper: dict):
    theirs, ours = small_model(dtype), small_model(dtype)
    adamw = torch.optim.AdamW(theirs.items(), **hyper)
    optimizer = MaskedEMAAdamW(ours.items(), isolation_ratio=0.0, backend="reference", **hyper)
    for _ in steps_from_one_state(adamw, theirs, optimizer, ours, 8):
        for name, p in ours.items():
            assert (p - theirs[name]).norm() <= TOLERANCE[dtype] * theirs[name].norm(), name
            for key in ("exp_avg", "exp_avg_sq"):
                mine, other = optimizer.state[p][key], adamw.state[theirs[name]][key]
                assert (mine - other).norm() <= TOLERANCE[dtype] * other.norm(), (name, key)


@pytest.mark.parametrize("rounding", [True, False])
def test_bfloat16_is_no_further_from_float64_than_torch(rounding: bool, target: Target):
    """At most twice the error of torch's bf16 step, both against float64 from the same state."""
    exact, theirs, ours = small_model(torch.float64), small_model(torch.bfloat16), small_model(torch.bfloat16)
    ours = {name: torch.nn.Parameter(p.detach().to(target.device)) for name, p in ours.items()}
    wide = torch.optim.AdamW(exact.items(), lr=1e-2)
    adamw = torch.optim.AdamW(theirs.items(), lr=1e-2)
    optimizer = make(ours, isolation_ratio=0.0, stochastic_rounding=rounding, backend=target.backend)
    # Per step from the same state, so that errors are of one step and do not add up differently.
    for number in range(6):
        for source, copies in ((theirs, exact), (theirs, ours)):
            with torch.no_grad():
                for name in copies:
                    copies[name].copy_(source[name])
        if number:
            saved = copy.deepcopy(adamw.state_dict())
            optimizer.load_state_dict(saved)
            wide.load_state_dict(saved)
        give_gradients(theirs, number)
        for name, p in theirs.items():
            exact[name].grad, ours[name].grad = p.grad.double(), p.grad.to(target.device)
        for each in (adamw, optimizer, wide):
            each.step()
        errors = [
            sum(float((p[name].detach().cpu().double() - exact[name].detach()).square().sum()) for name in p)
            ** 0.5
            for p in (ours, theirs)
        ]
        assert errors[0] <= 2 * errors[1]


def test_long_run_stays_beside_adamw():
    """100 steps in float64, where rounding does not hide a wrong formula."""
    theirs, ours = small_model(torch.float64), small_model(torch.float64)
    adamw = torch.optim.AdamW(theirs.items(), lr=1e-2, weight_decay=0.1)
    optimizer = make(ours, isolation_ratio=0.0, weight_decay=0.1)
    train(adamw, theirs, 100)
    train(optimizer, ours, 100)
    for name, p in ours.items():
        assert (p - theirs[name]).norm() <= 1e-12 * theirs[name].norm()


def test_signature_begins_like_adamw():
    """Every argument of torch's, with its default; those of ours after them, by keyword alone."""
    theirs = inspect.signature(torch.optim.AdamW.__init__).parameters
    ours = inspect.signature(MaskedEMAAdamW.__init__).parameters
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default and ours[name].kind == parameter.kind, name
    expected = {
        "isolation_ratio": 0.01,
        "mask_interval": 100,
        "mask_warmup": None,
        "importance_beta": None,
        "importance_dtype": torch.float32,
        "normalization": "minmax",
        "scope": "global",
        "layer_key": None,
        "hysteresis": 0.0,
        "state_dtype": None,
        "master_weight_bits": 16,
        "stochastic_rounding": None,
        "seed": 0,
        "backend": "auto",
        "offload": None,
        "isolation_granularity": "element",
    }
    assert {n: p.default for n, p in ours.items() if n not in theirs} == expected
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in expected)


@pytest.mark.parametrize("switch", ["foreach", "fused"])
def test_foreach_and_fused_change_nothing(switch: str):
    runs = []
    for value in (None, True, False):
        params = small_model()
        optimizer = make(params, **{switch: value})
        train(optimizer, params, 4)
        runs.append(params)
    for params in runs[1:]:
        assert all(torch.equal(p, runs[0][name]) for name, p in params.items())


def test_closure():
    params = small_model()
    optimizer = make(params)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params.values())
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert len(calls) == 1 and isinstance(first, torch.Tensor)
    for _ in range(20):
        last = optimizer.step(closure)
    assert float(last.detach()) < float(first.detach())
    assert optimizer.step() is None


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers(name: str, tensor_lr: bool):
    """As with AdamW, step by step; OneCycleLR moves the betas too. A tensor lr stays one."""
    theirs, ours = small_model(torch.float64), small_model(torch.float64)
    lr = (lambda: torch.tensor(1e-2, dtype=torch.float64)) if tensor_lr else lambda: 1e-2
    if tensor_lr and name == "one-cycle":
        pytest.skip("torch's OneCycleLR needs capturable or a float there")
    adamw = torch.optim.AdamW(theirs.items(), lr=lr(), foreach=False)
    optimizer = make(ours, isolation_ratio=0.0, lr=lr())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = [(adamw, theirs, SCHEDULERS[name](adamw)), (optimizer, ours, SCHEDULERS[name](optimizer))]
    for number in range(10):
        for each, params, scheduler in pairs:
            train(each, params, range(number, number + 1))
            scheduler.step()
        assert float(adamw.param_groups[0]["lr"]) == float(optimizer.param_groups[0]["lr"])
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == tensor_lr
        assert adamw.param_groups[0]["betas"] == optimizer.param_groups[0]["betas"]
    for key, p in ours.items():
        assert (p - theirs[key]).norm() <= 1e-12 * theirs[key].norm()


def test_gradients_are_left_alone():
    """Neither cleared nor changed, maximize included."""
    params = small_model()
    optimizer = make(params, maximize=True)
    give_gradients(params, 0)
    before = [p.grad.clone() for p in params.values()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params.values(), before, strict=True))


def test_zero_gradients_decay_and_nothing_else():
    params = small_model()
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = make(params, lr=0.5, weight_decay=0.5)
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, before[name] * 0.75) for name, p in params.items())


def test_step_without_gradients_is_none():
    params = small_model()
    optimizer = make(params)
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in params.items()) and len(optimizer.state) == 0


def test_hooks_run_around_step_and_load():
    params = small_model()
    optimizer = make(params)
    seen = []
    optimizer.register_step_pre_hook(lambda *a: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *a: seen.append("post"))
    optimizer.register_state_dict_post_hook(lambda o, s: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append("before load"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    train(optimizer, params, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "post", "saved", "before load", "loaded"]


def test_groups_have_their_own_values():
    params = small_model()
    groups = [
        {"params": [("embed", params["embed"])], "lr": 0.0, "weight_decay": 0.0},
        {"params": [("block.bias", params["block.bias"])], "lr": 0.1, "maximize": True, "betas": (0.5, 0.5)},
    ]
    optimizer = MaskedEMAAdamW(groups, lr=1.0, isolation_ratio=0.0, backend="reference")
    before = {name: p.detach().clone() for name, p in params.items()}
    give_gradients(params, 0)
    optimizer.step()
    assert torch.equal(params["embed"], before["embed"])
    moved = params["block.bias"].detach() - before["block.bias"]
    # maximize: one bias-corrected step of lr along the gradient's sign, beside a decay of lr * 0.01
    torch.testing.assert_close(moved + 1e-3 * before["block.bias"], 0.1 * params["block.bias"].grad.sign())
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.5) and optimizer.param_groups[0]["betas"] == (
        0.9,
        0.999,
    )


def test_autograd_notices_changed_weights(target: Target):
    """As with torch's AdamW, a backward pass through weights that a step has changed is refused."""
    weight = torch.nn.Parameter(torch.ones(5, 5))
    loss = (torch.ones(5, 5, requires_grad=True) @ weight).sum()
    weight.grad = torch.ones_like(weight)
    MaskedEMAAdamW([weight], backend=target.backend).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
