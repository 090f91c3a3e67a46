"""``torch.compile`` around a step, and the operators as a compiler would see them."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from epi_kernels import enable_gradient_release
from epi_kernels.backends import dispatch, operators
from python_tests.harness import ROOT, assert_same_run, give_gradients, make, small_model

BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def between_steps(optimizer, params, number: int) -> None:
    """What a training run changes: the learning rate, a mask of the user's, a refresh out of turn."""
    optimizer.param_groups[0]["lr"] = 1e-2 / (number + 1)
    if number == 3:
        mask = torch.zeros(19, 5, dtype=torch.bool)
        mask[::2] = True
        optimizer.set_isolation_mask(params["embed"], mask, persistent=True)
    if number == 4:
        optimizer.refresh_isolation_mask()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("compiler", BACKENDS)
def test_a_compiled_step_has_the_bits_of_an_eager_one(compiler, backend):
    runs = []
    for compiled in (False, True):
        params = small_model(torch.bfloat16)
        optimizer = make(params, backend=backend)
        step = torch.compile(optimizer.step, backend=compiler) if compiled else optimizer.step
        for number in range(8):
            give_gradients(params, number)
            step()
            between_steps(optimizer, params, number)
            if number == 0:
                once = dict(counters["frames"])
        runs.append(optimizer)
        assert counters["frames"] == once, "compiled again"
    assert once["ok"] > 0
    assert_same_run(*runs)
    assert runs[1].isolation_report().isolated > 50


def net_and_optimizer():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Embedding(19, 24), torch.nn.Linear(24, 24), torch.nn.LayerNorm(24))
    return net, make(dict(net.named_parameters()), backend="cpu")


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("compiler", BACKENDS)
def test_a_compiled_training_step(compiler, released):
    """Forward, backward and step in one function, which is compiled once."""
    runs = []
    for compiled in (False, True):
        net, optimizer = net_and_optimizer()
        if released:
            enable_gradient_release(net, optimizer)

        def training_step(tokens, net=net, optimizer=optimizer):
            loss = net(tokens).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        step = torch.compile(training_step, backend=compiler) if compiled else training_step
        for number in range(7):
            tokens = torch.randint(19, (4, 5), generator=torch.Generator().manual_seed(number))
            assert torch.isfinite(step(tokens))
            if number == 1:  # the first step makes state, gradients become None after it
                once = dict(counters["frames"])
        runs.append(optimizer)
        assert counters["frames"] == once, "compiled again"
    assert_same_run(*runs)
    assert runs[1].isolation_report().step == 6


def test_other_calls_in_a_compiled_function():
    runs = []
    for compiled in (False, True):
        net, optimizer = net_and_optimizer()

        def stage(net=net, optimizer=optimizer):
            net(torch.arange(19)).square().mean().backward()
            optimizer.step()
            optimizer.set_isolation_mask(net[1].bias, torch.ones(24, dtype=torch.bool))
            optimizer.refresh_isolation_mask()
            optimizer.carry_importance(optimizer.state_dict())
            optimizer.load_state_dict(optimizer.state_dict())
            return optimizer.isolation_report()

        (torch.compile(stage, backend="eager") if compiled else stage)()
        runs.append(optimizer)
    assert_same_run(*runs)


def test_a_whole_graph_is_refused_by_name():
    params = small_model()
    optimizer = make(params)
    give_gradients(params, 0)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"MaskedEMAAdamW\.step"):
        torch.compile(optimizer.step, fullgraph=True, backend="eager")()
    assert not optimizer.state


# ---------------------------------------------------------------- the operators

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


class Recorder:
    """The operators, with every call checked before it is made."""

    def __init__(self, ops):
        self._ops = ops
        self.checked: dict[str, int] = defaultdict(int)

    def __getattr__(self, name):
        operator = getattr(self._ops, name).default

        def checked(*arguments):
            # calls it more than once, on the tensors as they are, which is no training run any more
            result = torch.library.opcheck(operator, arguments, test_utils=CHECKS)
            assert set(result.values()) == {"SUCCESS"}
            self.checked[name] += 1
            return operator(*arguments)

        return checked


def test_opcheck(monkeypatch):
    """Every operator of the cpu backend, on what the optimizer hands it."""
    backend = dispatch.load("cpu")
    recorder = Recorder(operators.cpu_operators())
    monkeypatch.setattr(backend, "_ops", recorder)
    wide = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))  # makes two backends share a search
    for options in ({"normalization": "zscore"}, {"backend": "auto", "state_dtype": "int8"}):
        params = small_model(torch.bfloat16)
        if "backend" in options:
            params["wide"] = wide
        optimizer = make(params, **({"backend": "cpu", "mask_interval": 1} | options))
        for number in range(2):
            give_gradients(params, number)
            optimizer.grad_scale = torch.tensor(2.0) if number else None
            optimizer.step()
        optimizer.refresh_isolation_mask()
    assert set(recorder.checked) == set(operators.CPU_STAGES)
    for name, arguments in (("cpu_isa", ("plain",)), ("cpu_capability", ())):
        operator = getattr(torch.ops.epi_kernels, name).default
        assert set(torch.library.opcheck(operator, arguments, test_utils=CHECKS).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("source", "stages"),
    [("bindings.cpp", operators.CPU_STAGES), ("cuda/bindings_cuda.cpp", operators.CUDA_STAGES)],
)
def test_every_operator_that_writes_has_a_fake(source, stages):
    schemas = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', (ROOT / "csrc" / source).read_text())
    whole = ["".join(re.findall(r'"([^"]*)"', schema)) for schema in schemas]
    writes = [schema.partition("(")[0] for schema in whole if "!)" in schema]
    assert sorted(writes) == sorted(stages)
    assert all(schema.endswith("-> ()") for schema in whole if "!)" in schema)


@pytest.mark.gpu
def test_opcheck_on_a_gpu(monkeypatch):
    backend = dispatch.load("cuda")
    recorder = Recorder(operators.cuda_operators())
    monkeypatch.setattr(backend, "_ops", recorder)
    params = small_model(torch.bfloat16, device="cuda")
    optimizer = make(params, backend="cuda", mask_interval=1)
    for number in range(2):
        give_gradients(params, number)
        optimizer.grad_scale = torch.tensor(2.0, device="cuda") if number else None
        optimizer.step()
    optimizer.refresh_isolation_mask()
    assert set(recorder.checked) == set(operators.CUDA_STAGES)
