"""What is measured on a CPU, over how many elements, and what each figure must reach.

A case is one pair of callables over one list of parameters. The elements of the step and refresh
cases lie in ten tensors (ten layers), those of the linear cases in one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

import torch

from epi_kernels.reference import codec

STEP_LAYERS = 10
MANY_TENSORS, ELEMENTS_OF_EACH, ELEMENTS_OF_TINY = 300, 1_000, 16

INT8: dict[str, Any] = {"state_dtype": "int8"}

TORCH = "torch.optim.AdamW(fused=True)"
PLAIN_STEP = "the step it follows, no refresh due"
CPU_ADAM = "deepspeed.ops.adam.DeepSpeedCPUAdam"
COPY = "a copy of as many bytes"


class Target(NamedTuple):
    """``figure`` of a row must lie in [low, high]; a figure is a dotted path into the row."""

    figure: str
    high: float
    low: float | None = None

    def met(self, row: dict[str, Any]) -> bool | None:
        """None where the row lacks the figure."""
        value: Any = row
        for key in self.figure.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            return None
        return value <= self.high and (self.low is None or value >= self.low)

    def __str__(self) -> str:
        limits = f"at most {self.high:g}" if self.low is None else f"in [{self.low:g}, {self.high:g}]"
        return f"{self.figure} {limits}"


# A step beside torch's fused one; a refresh beside a step over the same elements.
STEP_FLOAT32 = Target("ratio.p50", 1.02)
STEP_BFLOAT16 = Target("ratio.p50", 0.75)
STEP_BFLOAT16_STOCHASTIC = Target("ratio.p50", 0.9)
STEP_INT8 = Target("ratio.p50", 0.9)
HOST = Target("ours_ms.p50", 0.4)  # of tensors so small that nothing else is left
HOST_FSDP2 = Target("ratio.p50", 0.2)
REFRESH = Target("ratio.p50", 1.0)
# The step of offloaded parameters: ahead of the peer's, and at 80 % of the bandwidth of a copy.
HOST_STEP = {CPU_ADAM: Target("ratio.p50", 1.0), COPY: Target("ratio.p50", 1.25)}
# Linear cost: every timed call finds cold caches, so that no size profits from them.
LINE = Target("line.deviation", 0.3)
LARGEST_TO_TENTH = Target("cost_ratio", 1.3)
REFRESH_PEAK = Target("extra_mib.refresh", 1.0)


@dataclass(frozen=True)
class Case:
    """One list of parameters, one optimizer over it, and what is measured of it."""

    name: str
    group: str  # step | refresh | linear | tensors | host
    dtype: torch.dtype  # of weights and gradients, and of exp_avg and exp_avg_sq unless the options say int8
    elements: int
    tensors: int
    options: dict[str, Any] = field(default_factory=dict)  # of MaskedEMAAdamW
    target: Target | None = None
    cold: bool = False  # caches are emptied before every timed call
    sharded: bool = False  # under FSDP2, on one rank
    beside: str = TORCH  # of a step
    mixed: bool = False  # every other tensor is bfloat16, whatever dtype says

    def tensor_sizes(self) -> list[int]:
        share, rest = divmod(self.elements, self.tensors)
        return [share + (i < rest) for i in range(self.tensors)]

    @property
    def itemsize(self) -> float:
        """Bytes of a weight and of a gradient's element; the mean where they are mixed."""
        return 3.0 if self.mixed else self.dtype.itemsize

    @property
    def state_itemsize(self) -> float:
        if self.options.get("state_dtype") != "int8":
            return self.itemsize
        return 1 + 1 / codec.BLOCK if min(self.tensor_sizes()) >= codec.MIN_ELEMENTS else 4

    @property
    def importance_itemsize(self) -> int:
        """Bytes of an own importance's element, 0 where exp_avg_sq serves."""
        if self.options.get("importance_beta") is None:
            return 0
        return self.options.get("importance_dtype", torch.float32).itemsize

    @property
    def correction_itemsize(self) -> float:
        """Bytes beside a bfloat16 weight; the mean where the weights are mixed."""
        bits = self.options.get("master_weight_bits", 16) - 16
        return bits / 8 * (0.5 if self.mixed else self.dtype == torch.bfloat16)

    @property
    def mask_bytes(self) -> float:
        return 1 / 8 if self.options.get("isolation_ratio", 0.01) > 0 else 0.0

    @property
    def step_bytes(self) -> float:
        """Read and written per element: weight with correction, gradient (read only), two states, own importance, mask."""
        weights = 3 * self.itemsize + 2 * self.correction_itemsize
        return weights + 4 * self.state_itemsize + 2 * self.importance_itemsize + self.mask_bytes

    @property
    def torch_step_bytes(self) -> float:
        return 7 * self.itemsize

    def refresh_bytes(self, *, stand_alone: bool) -> float:
        """Least per element: u once to count and once to select, the mask read and written.

        Stand-alone, the stats read u once more; a sample or a second counting pass is not in it.
        """
        u = self.importance_itemsize or self.state_itemsize
        return (3 if stand_alone else 2) * u + 2 * self.mask_bytes


@dataclass(frozen=True)
class Plan:
    """What one run measures and how long it takes over it."""

    elements: int = 100_000_000  # of the step and refresh cases: far beyond any cache, as models are
    sizes: tuple[int, ...] = (100_000, 1_000_000, 10_000_000, 100_000_000)  # of the linear cases
    copy_elements: int = 100_000_000  # float32, of the copy that gives the machine's bandwidth
    memory_elements: int = 100_000_000
    evict_bytes: int = 256 << 20  # read to empty the caches; larger than any last-level cache of a CPU we met
    seconds: float = 6.0  # a case, about
    min_rounds: int = 20
    max_rounds: int = 200
    threads: int = 2
    backend: str = "auto"
    judged: bool = True  # a smoke run's sizes say nothing about the targets

    def quick(self) -> Plan:
        return replace(
            self,
            elements=20_000,
            sizes=(1_000, 10_000, 100_000),
            copy_elements=100_000,
            memory_elements=20_000,
            evict_bytes=1 << 20,
            seconds=0.05,
            min_rounds=3,
            max_rounds=3,
            judged=False,
        )


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]


def scientific(n: int) -> str:
    """1e7 for 10,000,000; the number itself where that is not exact."""
    text = f"{n:.0e}".replace("e+0", "e").replace("e+", "e")
    return text if float(text) == n else str(n)


def step_cases(plan: Plan) -> list[Case]:
    """Steps with isolation on (a mask from a refresh, none due) beside torch's fused step."""
    f32, bf16 = torch.float32, torch.bfloat16
    own, int8 = {"importance_beta": 0.99}, INT8
    rows: list[tuple[str, torch.dtype, dict[str, Any], Target | None]] = [
        ("step-f32", f32, {}, STEP_FLOAT32),
        ("step-bf16", bf16, {"stochastic_rounding": False}, STEP_BFLOAT16),
        ("step-bf16-stochastic", bf16, {"stochastic_rounding": True}, STEP_BFLOAT16_STOCHASTIC),
        ("step-bf16-int8", bf16, int8 | {"stochastic_rounding": False}, None),
        ("step-bf16-int8-stochastic", bf16, int8, STEP_INT8),
        ("step-bf16-int8-24-bit-weights", bf16, int8 | {"master_weight_bits": 24}, None),
        ("step-bf16-32-bit-weights", bf16, {"master_weight_bits": 32}, None),
        ("step-f32-own-importance", f32, own, None),
        ("step-f32-ratio-0", f32, {"isolation_ratio": 0.0}, None),
    ]
    return [
        Case(name, "step", dtype, plan.elements, STEP_LAYERS, options, target)
        for name, dtype, options, target in rows
    ]


def refresh_cases(plan: Plan) -> list[Case]:
    """Every normalisation, scope and hysteresis, but zscore with hysteresis, which is refused."""
    cases = []
    for dtype, normalization, scope, hysteresis in product(
        (torch.float32, torch.bfloat16), ("minmax", "zscore", "none"), ("global", "layer"), (0.0, 0.1)
    ):
        if normalization == "zscore" and hysteresis > 0:
            continue
        name = f"refresh-{short(dtype)}-{normalization}-{scope}" + ("-hysteresis" if hysteresis else "")
        options = {"normalization": normalization, "scope": scope, "hysteresis": hysteresis}
        cases.append(Case(name, "refresh", dtype, plan.elements, STEP_LAYERS, options, REFRESH))
    return cases


def linear_cases(plan: Plan) -> list[Case]:
    """The float32 step from cold caches at every size; the fit over them is a row of its own."""
    return _cold_cases("linear-step-f32", plan)


def linear_refresh_cases(plan: Plan) -> list[Case]:
    """The default refresh likewise."""
    return _cold_cases("linear-refresh-f32", plan)


def _cold_cases(name: str, plan: Plan) -> list[Case]:
    return [Case(f"{name}-{scientific(n)}", "linear", torch.float32, n, 1, cold=True) for n in plan.sizes]


def tensors_cases(plan: Plan) -> list[Case]:
    """What a step costs the host, where the tensors are many and small."""
    n, name = MANY_TENSORS * ELEMENTS_OF_EACH, f"tensors-f32-{MANY_TENSORS}"
    plain = Case(name, "tensors", torch.float32, n, MANY_TENSORS)
    tiny = replace(plain, name=f"{name}-tiny", elements=MANY_TENSORS * ELEMENTS_OF_TINY, target=HOST)
    others = {
        "bf16": {"dtype": torch.bfloat16},
        "mixed": {"mixed": True},
        "mixed-int8-24-bit-weights": {"mixed": True, "options": INT8 | {"master_weight_bits": 24}},
    }
    return [
        tiny,
        *(
            replace(tiny, name=f"tensors-{word}-{MANY_TENSORS}-tiny", **changes)
            for word, changes in others.items()
        ),
        plain,
        replace(plain, name=f"{name}-fsdp2", target=HOST_FSDP2, sharded=True),
    ]


def host_cases(plan: Plan) -> list[Case]:
    """The float32 step in host memory beside what it is held against, round by round."""
    return [
        Case(
            f"host-step-f32-{name}",
            "host",
            torch.float32,
            plan.elements,
            STEP_LAYERS,
            {},
            target,
            beside=beside,
        )
        for name, (beside, target) in zip(("cpu-adam", "bandwidth"), HOST_STEP.items(), strict=True)
    ]
