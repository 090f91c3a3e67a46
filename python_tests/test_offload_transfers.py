"""The copies of offload="cpu": a wait that is missing shows in the bits, and what is on its way is bounded."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import time
import weakref

import pytest
import torch

from epi_kernels import enable_gradient_release
from epi_kernels.optim.offload import links, pipeline
from epi_kernels.optim.offload.staging import ALIGNMENT, Staging, aligned
from python_tests.harness import assert_same_run
from python_tests.released_net import Net, loss_of, optimizer_of, train
from python_tests.simulated_device import SimulatedLink, simulated  # noqa: F401


def weights_after(
    steps: int = 4, *, offload: str | None = "cpu", released: bool = True
) -> list[torch.Tensor]:
    net = Net()
    optimizer = optimizer_of(net, offload=offload)
    if released:
        enable_gradient_release(net, optimizer)
    train(net, optimizer, steps)
    return [param.detach().clone() for param in net.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def no_wait(queue: str):
    """A link on which whoever waits for copies of one direction does not."""

    class Impatient(SimulatedLink):
        def __init__(self, device):
            super().__init__(device)
            add = getattr(self, queue).add
            getattr(self, queue).add = lambda pairs: (add(pairs), lambda: None)[1]

    return Impatient


NAN = pytest.mark.filterwarnings("ignore:.*non-finite importance")  # what was not waited for


@NAN
@pytest.mark.parametrize("released", [False, True], ids=["at once", "released"])
@pytest.mark.parametrize("queue", ["out", "back"])
def test_a_missing_wait_is_seen(simulated, monkeypatch, queue, released):  # noqa: F811
    right = weights_after(offload=None, released=released)
    assert same(right, weights_after(released=released)) and simulated
    monkeypatch.setattr(links, "link_to", no_wait(queue))
    assert not same(right, weights_after(released=released))


@NAN
def test_a_gradient_let_go_too_early_is_seen(simulated, monkeypatch):  # noqa: F811
    right = weights_after(offload=None)
    make = pipeline._Job

    def forgetful(fetched, held, compute, put):
        return make(fetched, [], compute, put)

    monkeypatch.setattr(pipeline, "_Job", forgetful)
    assert not same(right, weights_after())


@NAN
def test_a_weight_let_go_too_early_is_seen(simulated, monkeypatch):  # noqa: F811
    """As of a model that is deleted after a backward that broke off, while the last copies are on their way."""
    right = weights_after(offload=None)
    make = pipeline._Job

    def forgetful(fetched, held, compute, put):
        once = [put]
        return make(fetched, held, compute, lambda: once.pop()())

    monkeypatch.setattr(pipeline, "_Job", forgetful)
    assert not same(right, weights_after())


@NAN
def test_room_lent_out_too_early_is_seen(simulated, monkeypatch):  # noqa: F811
    right = weights_after(offload=None)

    def early(self, wait, _):
        self._staging.give_back()
        time.sleep(0.005)  # whoever takes the room now writes over what is not copied yet
        wait()

    monkeypatch.setattr(pipeline.HostPipeline, "_return", early)
    assert not same(right, weights_after())


def test_without_drain_the_weights_are_not_back(simulated, monkeypatch):  # noqa: F811
    class Later(SimulatedLink):
        """Copies back wait for the test."""

        gate = threading.Event()

        def put(self, pairs):
            wait = super().put(pairs)
            return lambda: (self.gate.wait(30), wait())

    monkeypatch.setattr(links, "link_to", Later)
    net = Net()
    optimizer = optimizer_of(net, offload="cpu")
    ended = threading.Event()
    loss_of(net, 0).backward()
    thread = threading.Thread(target=lambda: (optimizer.step(), ended.set()))
    thread.start()
    assert not ended.wait(0.2), "step() returned before the weights were back"
    Later.gate.set()
    thread.join(30)
    assert ended.is_set() and all(torch.isfinite(param).all() for param in net.parameters())


class Recorded:
    """Stands for a stream, an event or a tensor of CUDA: writes down what is asked of it, in order."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def __getattr__(self, method):
        def call(*arguments, **options):
            told = [one.name if isinstance(one, Recorded) else one for one in arguments]
            self.log.append((self.name, method, *told, *options.values()))

        return call


def test_what_the_cuda_link_asks_for(monkeypatch):
    """A GPU's own tests are python_tests/gpu/test_gpu_offload.py; here the calls and their order."""
    log, names = [], iter(["out", "in"])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Recorded(log, next(names)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Recorded(log, "computing"))
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: Recorded(log, f"event, blocking {blocking}"))

    @contextlib.contextmanager
    def on(stream):
        log.append((stream.name, "begins"))
        yield
        log.append((stream.name, "ends"))

    monkeypatch.setattr(torch.cuda, "stream", on)
    link = links.link_to(torch.device("cuda", 0))
    on_device, on_host, event = Recorded(log, "device"), Recorded(log, "host"), "event, blocking True"
    wait = link.fetch([(on_device, on_host)])
    fetched = [("host", "copy_", "device", True), (event, "record", "out")]
    assert log == [("out", "wait_stream", "computing"), ("out", "begins"), *fetched, ("out", "ends")]
    log.clear()
    wait()
    assert log == [(event, "synchronize")]
    log.clear()
    link.put([(on_host, on_device)])
    put = [("device", "copy_", "host", True), (event, "record", "in")]
    assert log == [("in", "begins"), *put, ("in", "ends")]


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("room", [0, 1 << 16, 1 << 30])
def test_what_is_on_its_way_is_bounded(simulated, monkeypatch, room):  # noqa: F811
    """In both directions together; gradients of the model are let go when they are fetched."""
    monkeypatch.setattr(pipeline, "STAGING_BYTES", room)
    net = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(12)))
    optimizer = optimizer_of(net, offload="cpu")
    enable_gradient_release(net, optimizer)
    for _ in range(3):
        net(torch.ones(3, 32)).square().sum().backward()
        optimizer.step()
        assert all(param.grad is None for param in net.parameters())
    needs = [2 * aligned(4 * param.numel()) for param in net.parameters()]
    ring = max(max(needs), min(sum(needs), room))
    (link,) = simulated
    assert optimizer._pipeline.staging_bytes == ring
    assert 0 < link.out.most_bytes <= ring and 0 < link.back.most_bytes <= ring
    assert link.fetched == link.put_back == 3 * 24


def test_a_larger_parameter_that_joins_gets_room(simulated):  # noqa: F811
    runs = []
    for offload in (None, "cpu"):
        net = Net()
        optimizer = optimizer_of(net, offload=offload)
        train(net, optimizer, 2)
        torch.manual_seed(1)
        large = torch.nn.Parameter(torch.randn(200, 72))
        optimizer.add_param_group({"params": [("large", large)]})
        for step in range(2, 5):
            large.grad = torch.full_like(large, 0.1 * step)
            train(net, optimizer, range(step, step + 1))
        runs.append(optimizer)
    assert_same_run(*runs)
    assert runs[1]._pipeline.staging_bytes == 2 * 4 * large.numel()


def test_an_optimizer_that_goes_takes_its_threads_along(simulated):  # noqa: F811
    net = Net()
    optimizer = optimizer_of(net, offload="cpu")
    enable_gradient_release(net, optimizer)
    train(net, optimizer, 2)
    states = [weakref.ref(state["exp_avg_sq"]) for state in optimizer.state.values()]
    threads = [*optimizer._pipeline._steps._threads, *optimizer._pipeline._returns._threads]
    assert len(threads) == 2 and all(thread.is_alive() for thread in threads)
    del optimizer
    gc.collect()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert not any(ref() is not None for ref in states)


@pytest.mark.parametrize("seed", range(3))
def test_the_ring_lends_every_byte_once(seed):
    rng = random.Random(seed)
    ring = Staging(torch.zeros(40 * ALIGNMENT, dtype=torch.uint8))
    out: list[tuple[torch.Tensor, int]] = []
    for number in range(1, 400):
        size = rng.choice([0, 1, 64, 65, 640, rng.randint(0, 40 * ALIGNMENT)])
        while ring._room(aligned(size)) is None:
            oldest, written = out.pop(0)
            assert (oldest == written).all(), "written over while it was lent"
            ring.give_back()
        loan = ring.lend(size)
        assert loan.numel() == aligned(size) >= size
        assert (loan.data_ptr() - ring._memory.data_ptr()) % ALIGNMENT == 0
        out.append((loan.fill_(number % 251), number % 251))


def test_lending_waits_for_room():
    ring = Staging(torch.zeros(4 * ALIGNMENT, dtype=torch.uint8))
    ring.lend(3 * ALIGNMENT)
    lent = threading.Event()
    thread = threading.Thread(target=lambda: (ring.lend(2 * ALIGNMENT), lent.set()))
    thread.start()
    assert not lent.wait(0.1)
    ring.give_back()
    thread.join(10)
    assert lent.is_set()


# ---------------------------------------------------------------- failures


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("where", ["fetch", "wait for the fetch", "step", "put", "wait for the put"])
@pytest.mark.parametrize("released", [False, True], ids=["at once", "released"])
def test_a_copy_that_fails_is_raised_and_nothing_hangs(simulated, monkeypatch, where, released):  # noqa: F811
    fails_at = 3

    class Failing(SimulatedLink):
        def fetch(self, pairs):
            wait = super().fetch(pairs)
            self.fail("fetch", self.fetched)
            return lambda number=self.fetched: (wait(), self.fail("wait for the fetch", number))

        def put(self, pairs):
            wait = super().put(pairs)
            self.fail("put", self.put_back)
            return lambda number=self.put_back: (wait(), self.fail("wait for the put", number))

        def fail(self, here, number):
            if here == where and number == fails_at:
                raise Broken(here)

    monkeypatch.setattr(links, "link_to", Failing)
    net = Net()
    optimizer = optimizer_of(net, offload="cpu")
    if released:
        enable_gradient_release(net, optimizer)
    if where == "step":
        step, calls = pipeline.HostPipeline.submit, []

        def submit(self, weight, grad, compute, *, writes_grad):
            calls.append(1)
            number = len(calls)

            def failing(host_weight, host_grad):
                if number == fails_at:
                    raise Broken("step")
                compute(host_weight, host_grad)

            step(self, weight, grad, failing, writes_grad=writes_grad)

        monkeypatch.setattr(pipeline.HostPipeline, "submit", submit)
    before = {name: param.detach().clone() for name, param in net.named_parameters()}
    saved = optimizer.state_dict()
    with pytest.raises(Broken, match=where):
        train(net, optimizer, 1)
    # as after any failure in the middle of a step: back to what was saved, and on
    monkeypatch.undo()
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for name, param in net.named_parameters():
            param.copy_(before[name])
            param.grad = None
    optimizer._pipeline = None
    train(net, optimizer, 2)
    fresh = Net()
    other = optimizer_of(fresh)
    train(fresh, other, 2)
    assert_same_run(optimizer, other)
