"""Every row of the contract's table of errors: the right exception, a message that helps, nothing changed."""

from __future__ import annotations

import copy
import math
import re
import warnings

import pytest
import torch

from epi_kernels import MaskedEMAAdamW
from python_tests.harness import give_gradients, make, small_model, snapshot, train

REFUSED = (ValueError, TypeError, RuntimeError, NotImplementedError)

OUTSIDE = {
    "isolation_ratio": [-0.1, 1.0, 1.5, math.nan],
    "hysteresis": [-0.1, 1.0, math.nan],
    "mask_interval": [0, -1],
    "mask_warmup": [-1],
    "importance_beta": [-0.1, 1.0, math.nan],
    "lr": [-1e-3, math.nan],
    "eps": [-1e-8, math.nan],
    "weight_decay": [-1e-2, math.nan],
    "betas": [(-0.1, 0.9), (1.0, 0.9), (0.9, 1.0), (0.9, math.nan)],
    "importance_dtype": [torch.int8, torch.float16, "float33"],
    "state_dtype": [torch.float16, torch.int32, "int9"],
    "master_weight_bits": [8, 0, 23, True, "32", None],
    "normalization": ["min-max", None],
    "scope": ["tensor", None],
    "backend": ["gpu", None],
    "offload": ["cuda", "disk", True, torch.device("cpu")],
}
CASES = [(name, value) for name, values in OUTSIDE.items() for value in values]
# What a message must offer in place of the value given.
ALLOWED = {
    "isolation_ratio": "[0, 1)",
    "hysteresis": "[0, 1)",
    "importance_beta": "[0, 1)",
    "betas": "[0, 1)",
    "mask_interval": "1",
    "mask_warmup": "0",
    "lr": "0",
    "eps": "0",
    "weight_decay": "0",
    "importance_dtype": "torch.bfloat16",
    "state_dtype": "torch.bfloat16",
    "master_weight_bits": "16, 24, 32",
    "normalization": "zscore",
    "scope": "layer",
    "backend": "triton",
    "offload": "'cpu'",
}
GROUP_ARGUMENTS = ("lr", "eps", "weight_decay", "betas", "importance_beta")


def _value_in(message: str, value) -> bool:
    values = value if isinstance(value, tuple) else (value,)
    return any(repr(v) in message for v in values)


@pytest.mark.parametrize(("name", "value"), CASES)
def test_value_outside_its_range(name: str, value):
    """Named before torch's own checks of `params`, so that no half-made optimizer exists."""
    with pytest.raises(ValueError) as caught:
        MaskedEMAAdamW(None, **{name: value})
    message = str(caught.value)
    assert name in message and _value_in(message, value) and ALLOWED[name] in message


@pytest.mark.parametrize(("name", "value"), [case for case in CASES if case[0] in GROUP_ARGUMENTS])
def test_value_outside_its_range_in_a_group(name: str, value):
    params = small_model()
    with pytest.raises(ValueError, match=name):
        MaskedEMAAdamW([{"params": list(params.values()), name: value}])
    optimizer = make(params)
    train(optimizer, params, 3)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": [("late", torch.nn.Parameter(torch.ones(3)))], name: value})
    assert snapshot(optimizer) == before


GLOBAL = {
    "isolation_ratio": 0.1,
    "mask_interval": 10,
    "mask_warmup": 1,
    "importance_dtype": torch.float32,
    "normalization": "none",
    "scope": "layer",
    "layer_key": str,
    "hysteresis": 0.1,
    "state_dtype": torch.float32,
    "master_weight_bits": 32,
    "stochastic_rounding": False,
    "seed": 1,
    "backend": "reference",
    "amsgrad": False,
}


@pytest.mark.parametrize("name", GLOBAL)
def test_global_argument_in_a_group(name: str):
    params = small_model()
    with pytest.raises(ValueError, match=name):
        MaskedEMAAdamW([{"params": list(params.items()), name: GLOBAL[name]}])
    optimizer = make(params)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group(
            {"params": [("late", torch.nn.Parameter(torch.ones(3)))], name: GLOBAL[name]}
        )
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(("name", "instead"), [("amsgrad", "AdamW"), ("differentiable", "AdamW")])
def test_unsupported_switch(name: str, instead: str):
    with pytest.raises(REFUSED, match=name) as caught:
        MaskedEMAAdamW(small_model().items(), **{name: True})
    assert instead in str(caught.value)


def test_capturable_needs_a_backend_that_can_be_captured():
    with pytest.raises(NotImplementedError, match="capturable"):
        MaskedEMAAdamW(small_model().items(), capturable=True)


def test_foreach_and_fused():
    for arguments in ({"foreach": True}, {"fused": True}, {"foreach": False}, {"fused": False}):
        make(small_model(), **arguments)
    with pytest.raises(RuntimeError, match="fused"):
        make(small_model(), foreach=True, fused=True)


def test_hysteresis_with_zscore():
    with pytest.raises(ValueError, match=r"hysteresis[\s\S]*zscore"):
        MaskedEMAAdamW(None, hysteresis=0.1, normalization="zscore")


def test_weights_of_a_dtype_without_a_path():
    with pytest.raises(REFUSED, match="float16") as caught:
        make({"w": torch.nn.Parameter(torch.ones(3, dtype=torch.float16))})
    assert "bfloat16" in str(caught.value)
    with pytest.raises(REFUSED, match="complex") as caught:
        make({"w": torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))})
    assert "view_as_real" in str(caught.value)


def test_refused_parameters_do_not_join_a_live_optimizer():
    params = small_model()
    optimizer = make(params)
    train(optimizer, params, 3)
    before = snapshot(optimizer)
    with pytest.raises(REFUSED, match="float16"):
        optimizer.add_param_group({"params": [("h", torch.nn.Parameter(torch.ones(3).half()))]})
    assert snapshot(optimizer) == before


def test_expanded_gradient_under_a_loss_scale_steps_nothing():
    params = {"w": torch.nn.Parameter(torch.ones(8)), "b": torch.nn.Parameter(torch.ones(8))}
    optimizer = make(params)
    params["w"].grad, params["b"].grad = torch.ones(8), torch.ones(1).expand(8)
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.grad_scale = torch.tensor(2.0)
    with pytest.raises(RuntimeError, match=r"gradient of b is expanded .*\.contiguous\(\)"):
        optimizer.step()
    assert snapshot(optimizer) == before
    assert torch.equal(params["w"].grad, torch.ones(8))


def test_a_graph_capture_is_refused(monkeypatch):
    params = {"w": torch.nn.Parameter(torch.ones(8))}
    optimizer = make(params)
    params["w"].grad = torch.ones(8)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA graph: make the optimizer with capturable=True"):
        optimizer.step()
    assert not optimizer.state and torch.equal(params["w"], torch.ones(8))


@pytest.mark.parametrize("call", ["step", "refresh_isolation_mask"])
def test_warnings_point_at_the_caller(call):
    params = {"w": torch.nn.Parameter(torch.ones(8))}
    optimizer = make(params, isolation_ratio=0.01, mask_interval=1 if call == "step" else None)
    params["w"].grad = torch.full((8,), math.nan)
    if call != "step":
        optimizer.step()
    with pytest.warns(UserWarning) as caught:
        getattr(optimizer, call)()
    assert {"less than one", "non-finite"} <= {
        m for w in caught for m in ("less than one", "non-finite") if m in str(w.message)
    }
    assert {w.filename for w in caught} == {__file__}


def test_sparse_gradient_steps_nothing():
    """It is found before the parameters ahead of it are stepped."""
    params = small_model()
    optimizer = make(params)
    train(optimizer, params, 3)
    give_gradients(params, 3)
    params["block.weight"].grad = params["block.weight"].grad.to_sparse()
    before = [p.detach().clone() for p in params.values()]
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(REFUSED, match="sparse") as caught:
        optimizer.step()
    assert re.search(r"dense|SparseAdam", str(caught.value))
    assert all(torch.equal(p, b) for p, b in zip(params.values(), before, strict=True))
    assert str(optimizer.state_dict()) == str(state)


def test_layer_key_without_names():
    with pytest.raises(REFUSED, match="layer_key") as caught:
        make(small_model(), named=False, layer_key=lambda name: name)
    assert "named_parameters" in str(caught.value)


# --- masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(7, 7, dtype=torch.uint8),
        torch.ones(7, 7),
        torch.ones(7, 6, dtype=torch.bool),
        torch.ones(49, dtype=torch.bool),
        torch.ones(7, dtype=torch.bool),
        torch.ones((), dtype=torch.bool),
        torch.ones(7, 7, dtype=torch.bool, device="meta"),
        [[True] * 7] * 7,
    ],
    ids=["uint8", "float32", "columns", "flat", "row", "zero-dim", "device", "list"],
)
@pytest.mark.parametrize("trained", [0, 3])
def test_mask_that_does_not_fit(mask, persistent: bool, trained: int):
    params = small_model()
    optimizer = make(params)
    train(optimizer, params, trained)
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError)):
        optimizer.set_isolation_mask(params["block.weight"], mask, persistent=persistent)
    assert snapshot(optimizer) == before


def test_mask_of_a_parameter_that_is_not_ours():
    params = small_model()
    optimizer = make(params)
    before = snapshot(optimizer)
    stranger = torch.nn.Parameter(torch.ones(3))
    with pytest.raises((ValueError, KeyError)):
        optimizer.set_isolation_mask(stranger, torch.ones(3, dtype=torch.bool))
    with pytest.raises((ValueError, KeyError)):
        optimizer.isolation_mask(stranger)
    assert snapshot(optimizer) == before


# --- gradients ----------------------------------------------------------------------------------------------


def test_non_finite_gradient_warns_once_per_refresh():
    params = small_model()
    optimizer = make(params, mask_interval=2)
    counts = []
    for number in range(6):
        give_gradients(params, number)
        params["embed"].grad[0, :3] = torch.tensor([math.inf, -math.inf, math.nan])
        params["block.bias"].grad[0] = math.nan
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            optimizer.step()
            if optimizer.isolation_report() is not None:
                nonfinite = optimizer.isolation_report().nonfinite
                assert nonfinite == 4
        counts.append(sum("finite" in str(w.message) for w in seen))
    # The refreshes follow steps 2, 4 and 6; each may speak once, at the refresh or when its figures are read.
    assert [sum(counts[i : i + 2]) for i in (1, 3)] == [1, 1] and counts[0] == 0 and sum(counts) == 3


# --- devices ------------------------------------------------------------------------------------------------


def test_backend_by_name_never_falls_back():
    wide = {"w": torch.nn.Parameter(torch.ones(3, dtype=torch.float64))}
    for backend in ("cpu", "triton", "cuda"):
        with pytest.raises(RuntimeError, match=backend) as caught:
            optimizer = make(wide, backend=backend)
            train(optimizer, wide, 1)
        assert len(str(caught.value)) > len(backend) + 20  # with the reason
    assert torch.equal(wide["w"], torch.ones(3, dtype=torch.float64))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cuda backend may run here")
def test_backend_without_its_device():
    params = small_model()
    with pytest.raises(RuntimeError, match="cuda"):
        optimizer = make(params, backend="cuda")
        train(optimizer, params, 1)


def test_unsupported_device_names_every_backend():
    """Parameters without values are refused where they join, with the reason of each backend; nothing has changed."""
    params = small_model()
    optimizer = make(params, backend="auto")
    groups = len(optimizer.param_groups)
    empty = torch.zeros(3, device="meta", requires_grad=True)
    for attempt in (
        lambda: make({"w": empty}, backend="auto"),
        lambda: optimizer.add_param_group({"params": [("x", empty)]}),
    ):
        with pytest.raises(RuntimeError, match="materialise with to_empty first") as caught:
            attempt()
        for name in ("triton", "cuda", "cpu", "reference"):
            assert f"{name}:" in str(caught.value)
    assert len(optimizer.param_groups) == groups


def resize(optimizer, p):
    p.data = torch.ones(4000)


def half_moments(optimizer, p):
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].half()


def short_mask(optimizer, p):
    optimizer.state[p]["isolation_mask"] = torch.zeros(1, dtype=torch.uint8)


@pytest.mark.parametrize("damage", [resize, half_moments, short_mask], ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_state_that_does_not_fit_its_parameter_is_refused(backend: str, damage):
    """Kernels trust sizes and addresses: a resized embedding must not reach them."""
    p, other = torch.nn.Parameter(torch.ones(64)), torch.nn.Parameter(torch.ones(8))
    optimizer = MaskedEMAAdamW([("other", other), ("p", p)], backend=backend)
    p.grad, other.grad = torch.ones(64), torch.ones(8)
    optimizer.step()
    damage(optimizer, p)
    p.grad, before = torch.ones_like(p), other.detach().clone()
    with pytest.raises(RuntimeError, match="does not fit its parameter"):
        optimizer.step()
    assert torch.equal(other, before) and optimizer.param_groups[0]["isolation_step"] == 1


def test_two_parameters_of_one_name_are_refused():
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.raises(ValueError, match="named 'w'"):
        MaskedEMAAdamW([{"params": [("w", a)]}, {"params": [("w", b)]}])


def test_a_source_without_importance_is_refused():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = MaskedEMAAdamW([p])
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(ValueError, match="carries no importance"):
        optimizer.carry_importance(torch.optim.SGD([p], lr=0.1))
    assert optimizer.param_groups[0]["isolation_step"] == 1 and int(optimizer.state[p]["step"]) == 1


def test_an_unusable_group_value_leaves_no_state_behind():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = MaskedEMAAdamW([p])
    optimizer.param_groups[0]["eps"], p.grad = "bad", torch.ones(3)
    with pytest.raises(ValueError, match="eps must be"):
        optimizer.step()
    assert not optimizer.state and torch.equal(p, torch.ones(3))


def test_float64_weights_with_bfloat16_states_step():
    p = torch.nn.Parameter(torch.randn(9, dtype=torch.float64))
    optimizer = MaskedEMAAdamW([p], state_dtype=torch.bfloat16)
    p.grad, before = torch.randn_like(p), p.detach().clone()
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16 and not torch.equal(p, before)


@pytest.mark.parametrize("dtype", ["int8", torch.bfloat16])
def test_an_importance_dtype_that_no_group_uses_is_said_to_be_without_effect(dtype):
    def heard(groups: list[dict], **arguments) -> list[str]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            MaskedEMAAdamW(groups, importance_dtype=dtype, **arguments)
        assert all(one.filename == __file__ for one in found)
        return [str(one.message) for one in found]

    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    for shared in (None, 0.999):  # beta2
        (said,) = heard([{"params": [a]}], importance_beta=shared)
        assert f"importance_dtype={dtype} has no effect" in said and "importance_beta" in said
    assert not heard([{"params": [a]}], importance_beta=0.9)
    assert not heard([{"params": [a]}, {"params": [b], "importance_beta": 0.9}])
