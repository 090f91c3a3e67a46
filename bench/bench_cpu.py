"""pytest-benchmark cases on a CPU, each one pair.

pytest-benchmark times one callable a case. Pairing uses its ``pedantic`` mode: ours is the target,
which the library times round by round; what it is compared with runs in the library's untimed
``setup`` of the same round, timed here with the same clock. Rounds alternate A B A B in one process,
a ratio is taken inside each round, and the row reports percentiles of these ratios, so that a busy
neighbour slows both sides of a ratio.

Both optimizers step the same parameters, gradients and moments in place. Nothing is cloned or
zeroed, and neither side profits from where its pages happen to lie. Gradients are fixed.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from bench import registry
from bench.one_rank import one_rank, under_fsdp2
from bench.registry import Case, Plan
from epi_kernels import MaskedEMAAdamW
from epi_kernels.backends import choose

HYPER = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
WARMUP_ROUNDS = 3


def plan_of(config: pytest.Config) -> Plan:
    """The plan that bench.run put there; the full one when pytest runs this file by itself."""
    return getattr(config, "bench_plan", Plan())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    plan, fixtures = plan_of(metafunc.config), metafunc.fixturenames
    if "step_pair" in fixtures:
        cases = [
            *registry.step_cases(plan),
            *registry.linear_cases(plan),
            *registry.tensors_cases(plan),
        ]
        metafunc.parametrize("step_pair", cases, ids=lambda case: case.name, indirect=True)
    if "host_pair" in fixtures:
        cases = registry.host_cases(plan)
        metafunc.parametrize("host_pair", cases, ids=lambda case: case.name, indirect=True)
    if "refresh_pair" in fixtures:
        cases = [*registry.refresh_cases(plan), *registry.linear_refresh_cases(plan)]
        metafunc.parametrize("refresh_pair", cases, ids=lambda case: case.name, indirect=True)


class Pair(NamedTuple):
    case: Case
    ours: MaskedEMAAdamW
    torchs: torch.optim.Optimizer | None
    isolated: float  # share of the elements


def parameters(case: Case) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for layer, n in enumerate(case.tensor_sizes()):
        dtype = torch.bfloat16 if case.mixed and layer % 2 else case.dtype
        param = torch.nn.Parameter(torch.randn(n, generator=generator).mul_(0.02).to(dtype))
        # layers whose gradients differ by powers of ten, as a transformer's do
        scale = 10.0 ** -(2 + layer % 4)
        param.grad = torch.randn(n, generator=generator).mul_(scale).to(dtype)
        params.append(param)
    return params


def our_optimizer(
    case: Case, params: list[torch.nn.Parameter], backend: str, **options: Any
) -> MaskedEMAAdamW:
    """Stepped once, with a mask that a refresh selected."""
    ours = MaskedEMAAdamW(params, **HYPER, **{**case.options, **options}, backend=backend)
    ours.step()
    if case.options.get("isolation_ratio", 0.01) > 0:
        ours.refresh_isolation_mask()
    return ours


def isolated_share(ours: MaskedEMAAdamW, elements: int) -> float:
    report = ours.isolation_report()
    return report.isolated / elements if report is not None else 0.0


@pytest.fixture(scope="module")
def plan(request: pytest.FixtureRequest) -> Iterator[Plan]:
    before, plan = torch.get_num_threads(), plan_of(request.config)
    torch.set_num_threads(plan.threads)
    yield plan
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def step_pair(request: pytest.FixtureRequest, plan: Plan) -> Iterator[Pair]:
    """Ours with no refresh due, and torch's fused AdamW over the same weights and moments."""
    case: Case = request.param
    with one_rank() if case.sharded else contextlib.nullcontext():
        yield made_pair(case, plan)


def made_pair(case: Case, plan: Plan) -> Pair:
    params = under_fsdp2(parameters(case)) if case.sharded else parameters(case)
    ours = our_optimizer(case, params, plan.backend, mask_interval=None)
    torchs = torch.optim.AdamW(params, **HYPER, fused=True)
    torchs.step()
    coded = case.options.get("state_dtype") is not None
    for param in params:  # one set of moments for both, where they are alike
        for key in ("exp_avg", "exp_avg_sq"):
            moment = ours.state[param][key]
            assert coded or torchs.state[param][key].dtype == moment.dtype
            if torchs.state[param][key].dtype == moment.dtype:
                torchs.state[param][key] = moment
    return Pair(case, ours, torchs, isolated_share(ours, case.elements))


class HostPair(NamedTuple):
    ours: Pair
    beside: Callable[[], Any]


@pytest.fixture(scope="module")
def host_pair(request: pytest.FixtureRequest, plan: Plan) -> HostPair:
    """Ours with no refresh due, and DeepSpeed's step over the same weights or a copy of as many bytes."""
    case: Case = request.param
    params = parameters(case)
    if case.beside == registry.CPU_ADAM:
        if not plan.judged:
            pytest.skip("a smoke run waits for no peer's compiler")
        peer = pytest.importorskip("deepspeed.ops.adam", reason="DeepSpeed is not installed")
        beside = peer.DeepSpeedCPUAdam(params, **HYPER).step
        beside()
    else:
        source = torch.ones(case.elements)
        target, copied = (
            torch.zeros_like(source),
            int(case.elements * case.step_bytes / 8),
        )  # read and written
        sizes = [case.elements] * (copied // case.elements) + [copied % case.elements]

        def beside() -> None:
            for size in sizes:
                target[:size].copy_(source[:size])

    ours = our_optimizer(case, params, plan.backend, mask_interval=None)
    return HostPair(Pair(case, ours, None, isolated_share(ours, case.elements)), beside)


@pytest.fixture(scope="module")
def refresh_pair(request: pytest.FixtureRequest, plan: Plan) -> Pair:
    """Ours with a refresh due after every second step."""
    case: Case = request.param
    ours = our_optimizer(case, parameters(case), plan.backend, mask_interval=2)
    ours.step()  # T = 2, so that the next step has none due
    return Pair(case, ours, None, isolated_share(ours, case.elements))


@pytest.fixture(scope="module")
def evict(plan: Plan) -> Callable[[], None]:
    """Empties the caches by reading, which leaves no dirty lines for the timed call to write back."""
    buffer = torch.ones(plan.evict_bytes // 4)
    return lambda: None if buffer.sum() else None


def measure(
    benchmark: Any,
    plan: Plan,
    target: Callable[[], Any],
    beside: Callable[[], Any] | None,
    before: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Seconds of ``beside``, round by round (those of ``target`` are in the library's hands), and how
    often another process took a core away meanwhile: a parallel region waits for its last thread."""
    seconds: list[float] = []

    def setup() -> None:
        if beside is not None:
            if before is not None:
                before()
            start = time.perf_counter()
            beside()
            seconds.append(time.perf_counter() - start)
        if before is not None:
            before()

    for _ in range(WARMUP_ROUNDS):
        start = time.perf_counter()
        setup()
        target()
        round_seconds = time.perf_counter() - start
    seconds.clear()
    rounds = min(max(int(plan.seconds / round_seconds), plan.min_rounds), plan.max_rounds)
    gc.collect()
    gc.disable()  # a collection would land on one side of a pair
    preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    try:
        benchmark.pedantic(target, setup=setup, rounds=rounds)
    finally:
        gc.enable()
    preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - preempted
    return {"beside_seconds": seconds or None, "preempted_per_round": preempted / rounds}


def describe(case: Case, plan: Plan, pair: Pair | None = None, **facts: Any) -> dict[str, Any]:
    """What a row says besides its timings; bench.run adds these."""
    return {
        "name": case.name,
        "group": case.group,
        "dtype": "mixed" if case.mixed else str(case.dtype).removeprefix("torch."),
        "elements": case.elements,
        "tensors": case.tensors,
        "options": case.options,
        "cold": case.cold,
        "isolated": None if pair is None else pair.isolated,
        "backend": choose(plan.backend, torch.device("cpu"), case.dtype).backend.name,
        "threads": plan.threads,
        "target": None if case.target is None else case.target._asdict(),
        **facts,
    }


def test_copy(benchmark: Any, plan: Plan) -> None:
    """The bandwidth every other row is held against: bytes read and written by one large copy."""
    source, copy = torch.ones(plan.copy_elements), torch.zeros(plan.copy_elements)
    case = Case("copy", "copy", torch.float32, plan.copy_elements, 1)
    benchmark.group = case.group
    measured = measure(benchmark, plan, lambda: copy.copy_(source), None)
    benchmark.extra_info.update(describe(case, plan, bytes_per_element=8.0, backend="torch"), **measured)


def test_step(benchmark: Any, plan: Plan, step_pair: Pair, evict: Callable[[], None]) -> None:
    case, ours, torchs, _ = step_pair
    assert torchs is not None
    benchmark.group = case.group
    measured = measure(benchmark, plan, ours.step, torchs.step, evict if case.cold else None)
    facts = describe(case, plan, step_pair, bytes_per_element=case.step_bytes)
    facts["beside"] = case.beside
    facts["beside_bytes_per_element"] = case.torch_step_bytes
    benchmark.extra_info.update(facts, **measured)


def test_host_step(benchmark: Any, plan: Plan, host_pair: HostPair) -> None:
    pair, beside = host_pair
    benchmark.group = pair.case.group
    measured = measure(benchmark, plan, pair.ours.step, beside)
    facts = describe(pair.case, plan, pair, bytes_per_element=pair.case.step_bytes, beside=pair.case.beside)
    benchmark.extra_info.update(facts, **measured)


def rewind(ours: MaskedEMAAdamW) -> None:
    """Sets T back, so that the next step has no refresh due."""
    for group in ours.param_groups:
        group["isolation_step"] = 0


def test_refresh_after_step(
    benchmark: Any, plan: Plan, refresh_pair: Pair, evict: Callable[[], None]
) -> None:
    """What a refresh adds to a step: steps with one due, alternating with steps without."""
    case, ours, _, _ = refresh_pair
    rewind(ours)
    benchmark.group = case.group
    measured = measure(benchmark, plan, ours.step, ours.step, evict if case.cold else None)
    assert ours.param_groups[0]["isolation_step"] % 2 == 0, "the timed steps were not those with a refresh"
    facts = describe(case, plan, refresh_pair, bytes_per_element=case.refresh_bytes(stand_alone=False))
    facts |= {"name": f"{case.name}-after-step", "beside": registry.PLAIN_STEP, "minus_beside": True}
    benchmark.extra_info.update(facts, **measured)


def test_refresh_stand_alone(
    benchmark: Any, plan: Plan, refresh_pair: Pair, evict: Callable[[], None]
) -> None:
    """``refresh_isolation_mask()``, statistics included, beside a step with none due."""
    case, ours, _, _ = refresh_pair

    def before() -> None:
        rewind(ours)
        if case.cold:
            evict()

    benchmark.group = case.group
    measured = measure(benchmark, plan, ours.refresh_isolation_mask, ours.step, before)
    facts = describe(case, plan, refresh_pair, bytes_per_element=case.refresh_bytes(stand_alone=True))
    facts |= {"name": f"{case.name}-stand-alone", "beside": registry.PLAIN_STEP}
    benchmark.extra_info.update(facts, **measured)
