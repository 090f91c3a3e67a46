"""Watched tensors: moved memory is noticed, with the extension and without, and nothing outlives who watches."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch

import epi_kernels
from epi_kernels.backends.addresses import Watch, addresses
from python_tests.harness import make, small_model, train


@pytest.fixture(params=["extension", "python"])
def watch(request, monkeypatch):
    """Makes watches, as with the extension or as without it."""
    if request.param == "python":
        monkeypatch.delattr(epi_kernels, "_C", raising=False)
        monkeypatch.setitem(sys.modules, "epi_kernels._C", None)  # importing it raises ImportError

    def make_watch(tensors):
        made = Watch(tensors)
        assert (made._number is None) == (request.param == "python")
        return made

    return make_watch


def tensors() -> list[torch.Tensor]:
    return [torch.ones(7), torch.zeros((), dtype=torch.bfloat16), torch.ones(3, 5)[:, 1], torch.empty(0)]


def test_unmoved_until_memory_is_swapped(watch):
    held = tensors()
    watched = watch(held)
    assert watched.unmoved() and watched.unmoved()
    held[0].add_(1)
    assert watched.unmoved(), "other values, the same place"
    held[1].data = held[1].data.clone()
    assert not watched.unmoved()
    assert watch(held).unmoved()


def test_memory_swapped_for_a_view_of_it(watch):
    held = [torch.ones(8)]
    watched = watch(held)
    held[0].data = held[0].data[1:]
    assert not watched.unmoved()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.view(torch.int32),
        lambda t: t.view(2, 8),
        lambda t: t.t(),
        lambda t: t[:3],
        lambda t: t[:, :3],
    ],
    ids=["dtype", "shape", "strides", "fewer rows", "fewer columns"],
)
def test_another_layout_of_the_same_memory(watch, change):
    held = [torch.ones(4, 4)]
    watched, address = watch(held), held[0].data_ptr()
    held[0].data = change(held[0].data)
    assert held[0].data_ptr() == address and not watched.unmoved()


def test_nothing_to_watch(watch):
    assert watch([]).unmoved()


def test_watches_do_not_see_each_other(watch):
    first, second = tensors(), tensors()
    one, other = watch(first), watch(second)
    first[0].data = first[0].data.clone()
    assert not one.unmoved() and other.unmoved()
    del one
    gc.collect()
    assert other.unmoved()


def test_tensors_are_released_with_the_watch(watch):
    held = tensors()
    alive = [weakref.ref(tensor) for tensor in held]
    watched = watch(held)
    del held
    gc.collect()
    assert all(ref() is not None for ref in alive)
    del watched
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_state_dies_with_its_optimizer():
    params = small_model()
    optimizer = make(params, backend="cpu")
    train(optimizer, params, 3)
    alive = [weakref.ref(value) for state in optimizer.state.values() for value in state.values()]
    del optimizer
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_what_is_no_longer_watched_counts_as_moved():
    number = torch.ops.epi_kernels.watch(tensors())
    assert torch.ops.epi_kernels.unmoved(number)
    torch.ops.epi_kernels.unwatch(number)
    torch.ops.epi_kernels.unwatch(number)
    assert not torch.ops.epi_kernels.unmoved(number)


def test_weights_may_be_swapped():
    """torch.utils.swap_tensors wants tensors that Python alone holds; module.to() may use it."""
    params = small_model()
    optimizer = make(params, backend="cpu")
    train(optimizer, params, 2)
    p = params["embed"]
    optimizer.zero_grad(set_to_none=True)
    other = torch.nn.Parameter(torch.full_like(p, 2.0))
    torch.utils.swap_tensors(p, other)
    p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.state[p]["exp_avg"].zero_()
    optimizer.step()
    assert torch.equal(p, torch.full_like(p, 2.0)) and addresses([p])[0] == p.data_ptr()
