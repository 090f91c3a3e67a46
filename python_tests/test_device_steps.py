"""Backends that count steps where the parameters lie: a loss scaler's verdict never reaches the host."""

from __future__ import annotations

import pytest
import torch

from epi_kernels import AdaptiveInterval
from epi_kernels.backends import dispatch
from python_tests import cuda_emulation
from python_tests.harness import TARGETS, Target, make, small_model

EMULATED = Target("cuda")  # on CPU tensors


@pytest.fixture(params=[*(t for t in TARGETS if t.backend in ("triton", "cuda")), EMULATED], ids=str)
def device_target(request, monkeypatch) -> Target:
    if request.param is EMULATED:
        if cuda_emulation.missing() is not None:
            pytest.skip(f"emulation: {cuda_emulation.missing()}")
        emulated, load = cuda_emulation.EmulatedCudaBackend(), dispatch.load
        monkeypatch.setattr(dispatch, "load", lambda name: emulated if name == "cuda" else load(name))
        dispatch.choose.cache_clear()
    return request.param


class Unread(torch.Tensor):
    """A tensor whose value the host must not look at while ``forbidden``."""

    forbidden = False

    def item(self):
        if Unread.forbidden:
            raise AssertionError("the host waited for the device")
        return super().item()

    __bool__ = lambda self: bool(self.item())  # noqa: E731
    __float__ = lambda self: float(self.item())  # noqa: E731
    __int__ = lambda self: int(self.item())  # noqa: E731


INTERVALS = [5, lambda T: 5 if T < 9 else 2, AdaptiveInterval(5, minimum=2, low=0.9, high=0.95)]


@pytest.mark.parametrize("interval", INTERVALS, ids=["constant", "function", "adaptive"])
def test_a_device_that_counts_skips_steps_without_a_word_to_the_host(
    device_target: Target, interval, monkeypatch
):
    """T and the mask are those of a host that reads found_inf at every step."""
    skipped_at = {2, 3, 7, 8, 9, 14}
    runs, counts = [], []
    for backend in (device_target.backend, "reference"):
        params = small_model(device=device_target.device)
        optimizer = make(params, mask_interval=interval, backend=backend, isolation_ratio=0.2)
        reports = []
        for number in range(1, 20):
            for i, p in enumerate(params.values()):
                p.grad = torch.full_like(p, 0.1 * number + i) * torch.linspace(
                    1, 2, p.numel(), device=p.device
                ).view(p.shape)
            found = torch.tensor(float(number in skipped_at), device=device_target.device)
            on_device = backend != "reference"
            optimizer.found_inf = found.as_subclass(Unread) if on_device else found
            scale = torch.tensor(2.0, device=device_target.device)
            optimizer.grad_scale = scale.as_subclass(Unread) if on_device else scale
            # a host that does not know what was skipped may have to look where a refresh could be due
            looks = not on_device or optimizer._refresh_may_follow()
            counts.append(looks)
            with monkeypatch.context() as patch:
                patch.setattr(Unread, "forbidden", not looks)
                optimizer.step()
            report = optimizer.isolation_report()
            reports.append(None if report is None else report.as_dict())
        saved = optimizer.state_dict()
        assert saved["param_groups"][0]["isolation_step"] == 19 - len(skipped_at)
        states = [value.cpu() for state in saved["state"].values() for _, value in sorted(state.items())]
        runs.append((reports, [*states, *(p.detach().cpu() for p in params.values())]))
    assert runs[0][0] == runs[1][0]
    assert 2 <= counts[:19].count(True) <= 12
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_a_step_without_a_scaler_after_skipped_ones_is_counted_right(device_target: Target):
    """Nobody has read how many were skipped when the scaler is gone and a refresh may be due."""
    params = small_model(device=device_target.device)
    optimizer = make(params, mask_interval=4, backend=device_target.backend)
    for number in range(1, 8):
        for p in params.values():
            p.grad = torch.ones_like(p)
        optimizer.found_inf = torch.tensor(float(number < 3), device=device_target.device)
        if number == 4:
            del optimizer.found_inf
        optimizer.step()
        assert (optimizer.isolation_report() is None) == (number < 6)
    assert optimizer.isolation_report().step == 4


def test_a_host_that_looks_would_be_noticed(monkeypatch):
    monkeypatch.setattr(Unread, "forbidden", True)
    params = small_model()
    optimizer = make(params, backend="reference")
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.found_inf = torch.tensor(0.0).as_subclass(Unread)
    with pytest.raises(AssertionError, match="waited for the device"):
        optimizer.step()


def test_a_step_that_fails_is_no_skipped_step(device_target: Target):
    """T stands where it stood, though found_inf said to skip."""
    params = small_model(device=device_target.device)
    optimizer = make(params, mask_interval=100, backend=device_target.backend)
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.found_inf = torch.tensor(1.0, device=device_target.device)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["isolation_step"] == 1


def test_the_host_looks_once_where_a_refresh_may_be_due(device_target: Target):
    params = small_model(device=device_target.device)
    optimizer = make(params, mask_interval=100, backend=device_target.backend)
    looks = []
    for number in range(1, 106):
        for p in params.values():
            p.grad = torch.ones_like(p)
        optimizer.found_inf = torch.tensor(float(number == 40), device=device_target.device)
        looks.append(optimizer._refresh_may_follow())
        optimizer.step()
    assert [number for number, look in enumerate(looks, 1) if look] == [100, 101]
    assert (
        optimizer.isolation_report().step == 100
        and optimizer.state_dict()["param_groups"][0]["isolation_step"] == 104
    )


def test_step_lies_where_it_is_counted_and_survives_a_reload(device_target: Target):
    params = small_model(device=device_target.device)
    optimizer = make(params, backend=device_target.backend)
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    assert {state["step"].device.type for state in saved["state"].values()} == {device_target.device}
    fresh = make(params, backend=device_target.backend)
    fresh.load_state_dict(saved)
    fresh.step()
    assert {state["step"].item() for state in fresh.state.values()} == {2.0}
    assert {state["step"].device.type for state in fresh.state.values()} == {device_target.device}
