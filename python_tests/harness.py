"""Drives MaskedEMAAdamW and the oracle through the same run and compares them bit for bit."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

from epi_kernels.optim.compact import expanded
from python_tests import oracle, oracle_codec, oracle_master, oracle_nibbles
from python_tests.cases import Case, gradient, half, lay_out, optimizer_arguments

ROOT = Path(__file__).resolve().parents[1]
ISA_VARIABLE = "EPI_KERNELS_CPU_ISA"


# --- what runs here -----------------------------------------------------------------------------------------


def triton_has_wheels(platform: Mapping[str, str] | None = None) -> bool:
    """pyproject.toml's marker, asked of this machine or of one described by `platform`."""
    (line,) = re.findall(r'^ *"(triton\b.*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    marker = Requirement(line).marker
    assert marker is not None
    return marker.evaluate(dict(platform) if platform else None)


def need_triton() -> None:
    """For the top of a test module: without Triton it is skipped where there are no wheels, and fails elsewhere."""
    if triton_has_wheels():
        importlib.import_module("triton")
    else:
        pytest.importorskip("triton", reason="Triton has no wheels for this platform")


@dataclass(frozen=True)
class Target:
    """A backend, the device it steps on, and for `cpu` the instruction set."""

    backend: str
    device: str = "cpu"
    isa: str | None = None

    def __str__(self) -> str:
        return "-".join(part for part in (self.backend, self.isa, self.device) if part)

    @contextlib.contextmanager
    def active(self):
        """The backend is loaded anew with this instruction set, and again without it afterwards."""
        from epi_kernels.backends import dispatch

        before = os.environ.get(ISA_VARIABLE)
        if self.isa is not None:
            os.environ[ISA_VARIABLE] = self.isa
            dispatch.forget()
        try:
            yield self
        finally:
            if self.isa is not None:
                os.environ.pop(ISA_VARIABLE)
                if before is not None:
                    os.environ[ISA_VARIABLE] = before
                dispatch.forget()

    def unavailable(self) -> str | None:
        """Why it cannot run here; to be asked while active."""
        from epi_kernels.backends import dispatch

        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        backend = dispatch.load(self.backend)
        if isinstance(backend, str):
            return backend
        refusal = backend.refuses(torch.device(self.device), torch.float32)
        if refusal is None:
            # what an optimizer will step with, not only what is loaded
            chosen = dispatch.choose(self.backend, torch.device(self.device), torch.float32).backend
            isa = getattr(chosen, "isa", None)
            assert self.isa in (None, isa), f"asked for {self.isa}, got {isa}"
        return refusal

    @property
    def interpreted(self) -> bool:
        """Kernels run through Triton's interpreter: a refresh costs seconds, so tests do fewer."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def must_run(self) -> bool:
        """Whether being unavailable is a failure rather than a skip."""
        if self.backend == "triton":
            return triton_has_wheels()
        return self.device == "cpu" and self.isa in (None, "plain")


CPU_TARGETS = [Target("reference"), *(Target("cpu", isa=isa) for isa in ("avx512", "avx2", "plain"))]
# With a device Triton runs on it; without one it runs through its interpreter, on CPU tensors.
if torch.cuda.is_available():
    TARGETS = [*CPU_TARGETS, *(Target(name, "cuda") for name in ("reference", "triton", "cuda"))]
else:
    TARGETS = [*CPU_TARGETS, Target("triton")]


# --- comparing bits -----------------------------------------------------------------------------------------


def logical(tensor: torch.Tensor) -> np.ndarray:
    """Flat logical row-major values; bfloat16 as the float32 it stands for."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy().reshape(-1)


def stored(state: Mapping[str, torch.Tensor], name: str, n_elements: int | None = None) -> np.ndarray:
    """The values of a moment, flat and row-major."""
    if state[name].dtype != torch.uint8:
        return logical(state[name])
    if state[f"{name}_scale"].dtype == torch.bfloat16:
        beside = logical(state["exp_avg_sq"]) if name == "exp_avg" else None
        found = oracle_nibbles.values(logical(state[name]), logical(state[f"{name}_scale"]), beside)
        return found[:n_elements]
    codes, scales = logical(state[name]), logical(state[f"{name}_scale"])
    return oracle_codec.values(codes, scales, signed=name == "exp_avg")


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, not {expected.dtype}"
    assert actual.size == expected.size, f"{what}: {actual.size} elements, not {expected.size}"
    if actual.dtype.kind == "f":  # which NaN it is depends on the machine
        actual = np.where(np.isnan(actual), np.array(np.nan, actual.dtype), actual)
        expected = np.where(np.isnan(expected), np.array(np.nan, expected.dtype), expected)
    a, b = (np.ascontiguousarray(x).view(np.uint8).reshape(x.size, x.itemsize) for x in (actual, expected))
    wrong = np.flatnonzero((a != b).any(axis=1))
    if wrong.size:
        i = int(wrong[0])
        raise AssertionError(
            f"{what}: {wrong.size} of {actual.size} differ, the first at {i}: "
            f"{actual[i]!r}, not {expected[i]!r}"
        )


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def with_weights_of(params: dict, **kwargs) -> dict:
    copies = small_model(seed=77, **kwargs)
    with torch.no_grad():
        for name, p in copies.items():
            p.copy_(params[name])
    return copies


def through_a_file(state_dict: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def snapshot(optimizer: torch.optim.Optimizer) -> dict:
    """Everything that a failed call may not change: weights, gradients, state, groups, as plain values."""
    plain = lambda v: (v.dtype, v.shape, tensor_bytes(v)) if isinstance(v, torch.Tensor) else repr(v)  # noqa: E731
    seen = {"groups": [], "params": []}
    for group in optimizer.param_groups:
        seen["groups"].append({k: plain(v) for k, v in group.items() if k != "params"})
        for p in group["params"]:
            seen["params"].append(
                {
                    "id": id(p),
                    "weight": plain(p),
                    "grad": plain(p.grad),
                    "state": {k: plain(v) for k, v in optimizer.state.get(p, {}).items()},
                }
            )
    seen["foreign"] = len(optimizer.state)
    return seen


# --- one run, twice -----------------------------------------------------------------------------------------


class Pair:
    """A MaskedEMAAdamW and the oracle's run of the same case."""

    def __init__(self, case: Case, target: Target):
        from epi_kernels import MaskedEMAAdamW

        self.case, self.target = case, target
        self.rng = np.random.default_rng(case.seed)
        self.params: list[torch.Tensor] = []
        self.buffers: list[torch.Tensor] = []
        oracle_params, groups = [], []
        for hyper, specs in case.groups:
            members = []
            for spec in specs:
                values = half(self.rng.standard_normal(spec.shape), spec.dtype)
                tensor, buffer = lay_out(values, spec.dtype, spec.layout, target.device)
                tensor = torch.nn.Parameter(tensor)
                name = f"p{len(self.params)}" if case.named else None
                self.params.append(tensor)
                self.buffers.append(buffer)
                members.append((name, tensor) if case.named else tensor)
                oracle_params.append(oracle.Param(values, spec.dtype, hyper, name))
            groups.append({"params": members, **vars(hyper)})
        self.optimizer = MaskedEMAAdamW(groups, backend=target.backend, **optimizer_arguments(case.settings))
        self.oracle = oracle.Run(oracle_params, case.settings)

    def gradients(self, kinds: list[str | None]) -> list[np.ndarray | None]:
        """One flat gradient per parameter; None for a parameter without one."""
        return [
            None if kind is None else gradient(self.rng, math.prod(spec.shape), kind, spec.dtype)
            for kind, spec in zip(kinds, self.case.specs, strict=True)
        ]

    def step(self, grads: list[np.ndarray | None], **kwargs) -> None:
        """One step of both on the same gradients; grad_scale and found_inf as torch.amp.GradScaler sets them."""
        for p, spec, grad in zip(self.params, self.case.specs, grads, strict=True):
            p.grad = None
            if grad is not None:
                values = grad.reshape(spec.shape)
                p.grad = lay_out(values, spec.dtype, spec.grad_layout, self.target.device)[0]
        for name, value in kwargs.items():
            setattr(self.optimizer, name, torch.tensor(float(value), device=self.target.device))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.optimizer.step()
        finally:
            for name in kwargs:
                delattr(self.optimizer, name)
        written = self.oracle.step(grads, **kwargs)
        for i, (p, expected) in enumerate(zip(self.params, written, strict=True)):
            if expected is not None:
                assert_same_bits(logical(p.grad), expected.reshape(-1), f"p{i}.grad")

    def refresh(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer.refresh_isolation_mask()
        self.oracle.refresh()

    def check(self) -> None:
        """Weights, state, masks, T and the report are the oracle's, bit for bit."""
        for i, (p, expected) in enumerate(zip(self.params, self.oracle.params, strict=True)):
            self._check_param(i, p, expected)
        for group in self.optimizer.state_dict()["param_groups"]:  # exact here, whatever a device skipped
            assert group["isolation_step"] == self.oracle.T
        self._check_report()

    def _check_param(self, i: int, p: torch.Tensor, expected: oracle.Param) -> None:
        assert_same_bits(logical(p), expected.theta, f"p{i}")
        buffer = self.buffers[i]
        assert int(buffer.isnan().sum()) - int(p.isnan().sum()) == buffer.numel() - p.numel(), (
            f"p{i}: written outside the view"
        )
        state = expanded(self.optimizer.state.get(p, {}), p)
        packed = state.get("isolation_mask")
        if packed is not None:
            assert packed.dtype == torch.uint8 and packed.dim() == 1
            assert_same_bits(packed.cpu().numpy(), oracle.pack(expected.mask), f"p{i}.isolation_mask")
        else:
            assert not expected.mask.any()
        assert_same_bits(
            self.optimizer.isolation_mask(p).cpu().numpy().reshape(-1), expected.mask, f"mask of p{i}"
        )
        if expected.exp_avg is None:
            assert "exp_avg" not in state
            return
        assert state["step"].dtype == torch.float32 and state["step"].item() == expected.step
        names = ["exp_avg", "exp_avg_sq"] + ([] if expected.hyper.shared else ["importance"])
        for name in names:
            packed = f"{name}_scale" in state and state[f"{name}_scale"].dtype == torch.bfloat16
            assert state[name].shape == (((p.numel() + 1) // 2,) if packed else p.shape)
            assert_same_bits(stored(state, name, p.numel()), getattr(expected, name), f"p{i}.{name}")
        assert ("importance" in state) == (not expected.hyper.shared)
        assert ("weight_correction" in state) == (expected.master is not None)
        if expected.master is not None:
            correction = state["weight_correction"]
            assert correction.shape == p.shape
            bits = self.case.settings.master_weight_bits
            expected_correction = oracle_master.correction(expected.master, bits)
            assert_same_bits(logical(correction), expected_correction, f"p{i}.weight_correction")
            assert_same_bits(
                logical(self.optimizer.master_weight(p)), expected.master, f"master weight of p{i}"
            )

    def _check_report(self) -> None:
        actual, expected = self.optimizer.isolation_report(), self.oracle.report
        if expected is None:
            assert actual is None
            return
        for name in ("step", "ratio", "threshold", "jaccard", "isolated", "entered", "released", "ties"):
            assert getattr(actual, name) == getattr(expected, name), name
        assert actual.nonfinite == expected.nonfinite
        figures = ("name", "elements", "isolated", "entered", "released", "jaccard", "nonfinite")
        rows = [
            sorted(tuple(getattr(row, f) for f in figures) for row in r.layers) for r in (actual, expected)
        ]
        assert rows[0] == rows[1]


# --- small runs without the oracle --------------------------------------------------------------------------


def small_model(
    dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> dict[str, torch.nn.Parameter]:
    """Four parameters of awkward sizes, by name."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (19, 5), "block.weight": (7, 7), "block.bias": (7,), "scale": ()}
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        for name, shape in shapes.items()
    }


def make(params: dict[str, torch.Tensor], *, named: bool = True, **arguments) -> torch.optim.Optimizer:
    """MaskedEMAAdamW over them, on the reference backend and with refreshes early unless told otherwise."""
    from epi_kernels import MaskedEMAAdamW

    defaults = {"backend": "reference", "isolation_ratio": 0.2, "mask_interval": 2, "lr": 1e-2}
    return MaskedEMAAdamW(list(params.items()) if named else list(params.values()), **(defaults | arguments))


def give_gradients(params: dict[str, torch.Tensor], seed: int) -> None:
    """Gradients that depend on the seed and each parameter's place alone."""
    for i, p in enumerate(params.values()):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def train(optimizer: torch.optim.Optimizer, params: dict[str, torch.Tensor], steps: range | int) -> None:
    """One step for every number in `steps`, on the gradients of that number."""
    for number in range(steps) if isinstance(steps, int) else steps:
        give_gradients(params, number)
        optimizer.step()


def assert_same_run(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Weights, every state tensor and T agree to the bit."""
    for one, other in zip(a.param_groups, b.param_groups, strict=True):
        assert one["isolation_step"] == other["isolation_step"]
        for p, q in zip(one["params"], other["params"], strict=True):
            assert tensor_bytes(p) == tensor_bytes(q)
            assert a.state[p].keys() == b.state[q].keys()
            for key, value in a.state[p].items():
                assert (value.dtype, value.shape) == (b.state[q][key].dtype, b.state[q][key].shape), key
                assert tensor_bytes(value) == tensor_bytes(b.state[q][key]), key
