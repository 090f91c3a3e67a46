"""torch's own way of testing optimizers: an ``OptimizerInfo`` a backend, and the cases that its suite asks of every one.

The harness (``torch.testing._internal.common_optimizers``) ships with torch, its cases do not; these are written anew.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    optims,
)
from torch.testing._internal.common_utils import TestCase

from python_tests.optimizer_infos import INFOS, SOON


def regression(device: Any, dtype: torch.dtype, *, contiguous: bool = True) -> tuple[list, Callable]:
    """(weight and bias, the loss of a linear model that they start away from)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 5, generator=generator).to(device, dtype)
    bias = torch.randn(10, generator=generator).to(device, dtype)
    data = torch.randn(5, generator=generator).to(device, dtype)
    if not contiguous:
        weight, bias = weight.repeat(1, 2)[:, ::2], bias.repeat(2)[::2]
    params = [torch.nn.Parameter(weight), torch.nn.Parameter(bias)]

    def loss() -> torch.Tensor:
        return (params[0].mv(data) + params[1]).pow(2).sum()

    return params, loss


def steps(optimizer: torch.optim.Optimizer, loss: Callable, n: int) -> Iterator[float]:
    """Losses before each of n steps."""

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(n):
        yield optimizer.step(closure).item()


def each_input(test: Callable) -> Callable:
    """The test once for every set of constructor arguments, which it is given as ``kwargs``."""

    def over_inputs(self, device, dtype, optim_info):
        for one in optim_info.optim_inputs_func(device):
            with self.subTest(one.desc):
                test(self, device, dtype, optim_info, copy.deepcopy(one.kwargs))

    over_inputs.__name__ = test.__name__
    return over_inputs


class TestOptimizers(TestCase):
    def assert_same_params(self, one: list, other: list) -> None:
        for p, q in zip(one, other, strict=True):
            self.assertEqual(p, q, rtol=0, atol=0)

    @optims(INFOS)
    def test_errors(self, device, dtype, optim_info):
        for one in optim_info.optim_error_inputs_func(device, dtype):
            case = one.optimizer_error_input
            params = [torch.nn.Parameter(torch.ones(1, 1))] if case.params is None else case.params
            with self.subTest(case.desc):
                self.assertIs(one.error_on, OptimizerErrorEnum.CONSTRUCTION_ERROR)
                if issubclass(one.error_type, Warning):
                    with self.assertWarnsRegex(one.error_type, one.error_regex):
                        optim_info.optim_cls(params, **case.kwargs)
                else:
                    with self.assertRaisesRegex(one.error_type, one.error_regex):
                        optim_info.optim_cls(params, **case.kwargs)

    @optims(INFOS)
    def test_goes_in_the_right_direction(self, device, dtype, optim_info):
        for contiguous in (True, False):
            for schedulers in ([], *optim_info.scheduler_inputs):
                for one in optim_info.optim_inputs_func(device):
                    kwargs = copy.deepcopy(one.kwargs)
                    with self.subTest(one.desc):
                        params, loss = regression(device, dtype, contiguous=contiguous)
                        sign = -1 if kwargs.get("maximize") else 1
                        optimizer = optim_info.optim_cls(params, **kwargs)
                        chained = [make(optimizer) for make in schedulers]
                        first = loss().item()
                        for value in steps(optimizer, loss, 20):
                            for scheduler in chained:
                                args = (value,) if isinstance(scheduler, ReduceLROnPlateau) else ()
                                scheduler.step(*args)
                        self.assertLess(sign * loss().item(), sign * first)

    @optims(INFOS)
    def test_a_tensor_lr_is_a_float(self, device, dtype, optim_info):
        runs = []
        for lr in (0.01, torch.tensor(0.01), torch.tensor([[0.01]])):
            params, loss = regression(device, dtype)
            list(steps(optim_info.optim_cls(params, lr=lr, **SOON), loss, 5))
            runs.append(params)
        # 0.01 as a float32 is not the float64: the step scalars differ before they are rounded
        self.assertEqual(runs[0], runs[1], rtol=1e-6, atol=1e-7)
        self.assert_same_params(runs[1], runs[2])

    @optims(INFOS)
    def test_groups_have_their_own_options(self, device, dtype, optim_info):
        params, loss = regression(device, dtype)
        before = [p.detach().clone() for p in params]
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.0}]
        optimizer = optim_info.optim_cls(groups, lr=0.01, weight_decay=0.1)
        list(steps(optimizer, loss, 3))
        self.assertNotEqual(params[0], before[0])
        self.assertEqual(params[1], before[1], rtol=0, atol=0)

    @optims(INFOS)
    @each_input
    def test_without_gradients_nothing_moves(self, device, dtype, optim_info, kwargs):
        params, _ = regression(device, dtype)
        before = [p.detach().clone() for p in params]
        optimizer = optim_info.optim_cls(params, **kwargs)
        for _ in range(3):
            optimizer.step()
        self.assert_same_params(params, before)
        self.assertEqual(len(optimizer.state), 0)

    @optims(INFOS)
    @each_input
    def test_zero_gradients_move_by_weight_decay_alone(self, device, dtype, optim_info, kwargs):
        params, _ = regression(device, dtype)
        kwargs["weight_decay"] = 0.0
        before = [p.detach().clone() for p in params]
        optimizer = optim_info.optim_cls(params, **kwargs)
        for p in params:
            p.grad = torch.zeros_like(p)
        for _ in range(4):
            optimizer.step()
        self.assert_same_params(params, before)

    @optims(INFOS)
    @each_input
    def test_one_state_dict_two_equal_runs(self, device, dtype, optim_info, kwargs):
        params, loss = regression(device, dtype)
        optimizer = optim_info.optim_cls(params, **kwargs)
        list(steps(optimizer, loss, 3))
        other_params, other_loss = regression(device, dtype)
        with torch.no_grad():
            for p, q in zip(other_params, params, strict=True):
                p.copy_(q)
        other = optim_info.optim_cls(other_params, **kwargs)
        saved = copy.deepcopy(optimizer.state_dict())
        other.load_state_dict(saved)
        self.assertEqual(other.state_dict(), saved)
        for _ in zip(steps(optimizer, loss, 4), steps(other, other_loss, 4), strict=True):
            pass
        self.assert_same_params(params, other_params)
        self.assertEqual(optimizer.state_dict(), other.state_dict())

    @optims(INFOS)
    @each_input
    def test_a_state_dict_survives_a_file(self, device, dtype, optim_info, kwargs):
        params, loss = regression(device, dtype)
        optimizer = optim_info.optim_cls(params, **kwargs)
        list(steps(optimizer, loss, 3))
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        self.assertEqual(torch.load(buffer, weights_only=True), optimizer.state_dict())

    @optims(INFOS)
    def test_an_older_state_dict_loads(self, device, dtype, optim_info):
        """Groups of before torch knew these flags, and of before there was isolation."""
        params, loss = regression(device, dtype)
        optimizer = optim_info.optim_cls(params, isolation_ratio=0.0)
        list(steps(optimizer, loss, 3))
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            for flag in ("maximize", "foreach", "capturable", "differentiable", "fused", "isolate"):
                group.pop(flag, None)
            for key in ("importance_beta", "isolation_step", "isolation_version"):
                group.pop(key)
        fresh = optim_info.optim_cls(params, isolation_ratio=0.0)
        fresh.load_state_dict(saved)
        self.assertEqual(fresh.state_dict(), optimizer.state_dict())

    @optims(INFOS)
    def test_names_go_along(self, device, dtype, optim_info):
        params, loss = regression(device, dtype)
        named = optim_info.optim_cls(list(zip(("weight", "bias"), params, strict=True)))
        list(steps(named, loss, 2))
        saved = named.state_dict()
        self.assertEqual(saved["param_groups"][0]["param_names"], ["weight", "bias"])
        unnamed = optim_info.optim_cls(params)
        unnamed.load_state_dict(saved)
        renamed = optim_info.optim_cls([("other", params[0]), ("bias", params[1])])
        with self.assertRaisesRegex(ValueError, "other"):
            renamed.load_state_dict(saved)

    @optims(INFOS)
    @each_input
    def test_deepcopy_goes_its_own_way(self, device, dtype, optim_info, kwargs):
        params, loss = regression(device, dtype)
        optimizer = optim_info.optim_cls(params, **kwargs)
        list(steps(optimizer, loss, 2))
        twin = copy.deepcopy(optimizer)
        copied = [p for group in twin.param_groups for p in group["params"]]
        self.assert_same_params(copied, params)
        before = [p.detach().clone() for p in copied]
        list(steps(optimizer, loss, 2))
        self.assert_same_params(copied, before)

    @optims(INFOS)
    def test_hooks_run_in_order(self, device, dtype, optim_info):
        params, loss = regression(device, dtype)
        optimizer = optim_info.optim_cls(params, **SOON)
        called: list[str] = []
        note = lambda name: lambda *_: called.append(name)  # noqa: E731
        optimizer.register_step_pre_hook(note("before"))
        removed = optimizer.register_step_post_hook(note("after"))
        optimizer.register_state_dict_pre_hook(note("saving"))
        optimizer.register_state_dict_post_hook(note("saved"))
        optimizer.register_load_state_dict_pre_hook(note("loading"))
        optimizer.register_load_state_dict_post_hook(note("loaded"))
        list(steps(optimizer, loss, 2))
        removed.remove()
        list(steps(optimizer, loss, 1))
        optimizer.load_state_dict(optimizer.state_dict())
        self.assertEqual(called, ["before", "after"] * 2 + ["before", "saving", "saved", "loading", "loaded"])

    @optims(INFOS)
    def test_a_load_hook_may_hand_over_another_dict(self, device, dtype, optim_info):
        params, loss = regression(device, dtype)
        optimizer = optim_info.optim_cls(params, lr=0.5)
        list(steps(optimizer, loss, 1))

        def slower(_, state_dict):
            replaced = copy.deepcopy(state_dict)
            replaced["param_groups"][0]["lr"] = 0.25
            return replaced

        optimizer.register_load_state_dict_pre_hook(slower)
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        self.assertEqual(optimizer.param_groups[0]["lr"], 0.25)
        self.assertEqual(saved["param_groups"][0]["lr"], 0.5)

    @optims(INFOS)
    def test_foreach_and_fused_change_nothing(self, device, dtype, optim_info):
        runs = []
        for flags in ({}, {"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}):
            params, loss = regression(device, dtype)
            list(steps(optim_info.optim_cls(params, **flags, **SOON), loss, 5))
            runs.append(params)
        for other in runs[1:]:
            self.assert_same_params(runs[0], other)
        with self.assertRaisesRegex(RuntimeError, "cannot be `True` together"):
            optim_info.optim_cls(runs[0], foreach=True, fused=True)

    @optims(INFOS)
    def test_every_scheduler_of_torch(self, device, dtype, optim_info):
        from torch.optim import lr_scheduler as of_torch

        makers: list[Callable] = [
            lambda o: of_torch.ConstantLR(o, total_iters=3),
            lambda o: of_torch.LinearLR(o, total_iters=4),
            lambda o: of_torch.ExponentialLR(o, 0.9),
            lambda o: of_torch.PolynomialLR(o, total_iters=6),
            lambda o: of_torch.MultiStepLR(o, [2, 4]),
            lambda o: of_torch.MultiplicativeLR(o, lambda _: 0.95),
            lambda o: of_torch.CosineAnnealingWarmRestarts(o, 3),
            lambda o: of_torch.CyclicLR(o, 1e-4, 1e-2, cycle_momentum=True, base_momentum=0.8),
            lambda o: of_torch.OneCycleLR(o, 1e-2, total_steps=8),
            lambda o: of_torch.SequentialLR(
                o, [of_torch.ConstantLR(o), of_torch.ExponentialLR(o, 0.9)], milestones=[3]
            ),
        ]
        for make in makers:
            for lr in (1e-3, torch.tensor(1e-3)):
                params, loss = regression(device, dtype)
                optimizer = optim_info.optim_cls(params, lr=lr)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        scheduler = make(optimizer)
                    except (TypeError, ValueError, RuntimeError) as refusal:
                        # what torch's own AdamW is refused by the scheduler, so are we
                        with self.assertRaises(type(refusal)):
                            make(torch.optim.AdamW(regression(device, dtype)[0], lr=lr))
                        continue
                    first = loss().item()
                    for _ in steps(optimizer, loss, 6):
                        scheduler.step()
                    self.assertLess(loss().item(), first)


Cases = TestOptimizers  # for other devices: gpu/test_gpu_conformance.py
instantiate_device_type_tests(TestOptimizers, globals(), only_for="cpu")
