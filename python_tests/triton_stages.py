"""One parameter list through a stage of the Triton backend and through the reference, compared bit for bit.

Without a device the kernels run through Triton's interpreter on CPU tensors; with one, on it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from epi_kernels.backends.reference import ReferenceBackend
from epi_kernels.reference import bits
from epi_kernels.reference.scalars import HyperParameters
from epi_kernels.reference.stats import LayerStats
from epi_kernels.reference.tensors import ParamTensors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, BF16 = torch.float32, torch.bfloat16
BLOCK = 1024  # of bf16 and of a refresh; the float32 step's is half of it
CHUNK = 2 * BLOCK  # the smallest chunks, so that small tensors span several

REFERENCE = ReferenceBackend()


def backend():
    from epi_kernels.backends.triton import TritonBackend

    return TritonBackend(step_chunk=CHUNK, refresh_chunk=CHUNK)


@dataclass(frozen=True)
class Spec:
    """One parameter of a test."""

    n: int
    param: torch.dtype = F32
    state: torch.dtype = F32
    importance: torch.dtype | None = None
    isolated: float | None = 0.3  # share of elements; None: no mask
    persistent: float | None = None
    layer: int = 0
    maximize: bool = False
    index_offset: int = 0
    offset: int = 0  # elements that every tensor starts behind an aligned address
    transposed: bool = False
    u_values: tuple[float, ...] = field(default=())  # written over the first importances


def make(*specs: Spec, seed: int = 0) -> list[ParamTensors]:
    """The tensors of the reference, on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def laid(values: Tensor, dtype: torch.dtype, spec: Spec, *, strided: bool = False) -> Tensor:
        buffer = torch.full((spec.n + spec.offset,), torch.nan, dtype=dtype)
        tensor = buffer[spec.offset :]
        tensor.copy_(values)
        if strided and spec.transposed:
            tensor = tensor.view(-1, spec.n // 2).t() if spec.n % 2 == 0 and spec.n else tensor
        return tensor

    def normal(spec: Spec) -> Tensor:
        return torch.randn(spec.n, generator=generator)

    def packed(share: float | None, spec: Spec) -> Tensor | None:
        if share is None:
            return None
        return bits.pack(torch.rand(spec.n, generator=generator) < share)

    items = []
    for i, spec in enumerate(specs):
        exp_avg_sq = laid(normal(spec).square() * 1e-4, spec.state, spec)
        importance = None
        if spec.importance is not None:
            importance = laid(normal(spec).square() * 1e-6, spec.importance, spec)
        u = exp_avg_sq if importance is None else importance
        special = torch.tensor(spec.u_values[: spec.n])
        u[: special.numel()] = special.to(u.dtype)
        items.append(
            ParamTensors(
                param=laid(normal(spec), spec.param, spec, strided=True),
                grad=laid(normal(spec), spec.param, spec, strided=True),
                exp_avg=laid(normal(spec) * 0.1, spec.state, spec),
                exp_avg_sq=exp_avg_sq,
                importance=importance,
                isolation_mask=packed(spec.isolated, spec),
                persistent_mask=packed(spec.persistent, spec),
                layer=spec.layer,
                step=torch.tensor(2.0 + i),
                hyper=HyperParameters(
                    lr=1e-2, beta1=0.9, beta2=0.99, beta_u=0.97, eps=1e-8, weight_decay=0.1
                ),
                maximize=spec.maximize,
                rng_id=(0x9E3779B9 * (i + 1)) & 0xFFFFFFFF,
                index_offset=spec.index_offset,
            )
        )
    return items


_TENSORS = (
    "param",
    "grad",
    "exp_avg",
    "exp_avg_sq",
    "importance",
    "isolation_mask",
    "persistent_mask",
    "step",
)


def on_device(items: list[ParamTensors], specs: tuple[Spec, ...]) -> list[ParamTensors]:
    """A copy on DEVICE whose tensors have the same strides and the same distance to alignment."""
    result = []
    for item, spec in zip(items, specs, strict=True):
        tensors = {}
        for name in _TENSORS:
            tensor = getattr(item, name)
            if tensor is None:
                continue
            room = torch.empty(tensor.numel() + spec.offset, dtype=tensor.dtype, device=DEVICE)
            behind = spec.offset if tensor.dtype != torch.uint8 else 0
            place = room[behind : behind + tensor.numel()].as_strided(tensor.shape, tensor.stride(), behind)
            tensors[name] = place.copy_(tensor)
        result.append(replace(item, **tensors))
    return result


def assert_same(actual: list[ParamTensors], expected: list[ParamTensors]) -> None:
    """Every tensor to the bit; a NaN stands for any NaN."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        for name in _TENSORS:
            x, y = getattr(a, name), getattr(e, name)
            if y is None:
                continue
            same_bits(x, y, f"{i}.{name}")


def same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    x, y = actual.cpu().contiguous().view(-1), expected.contiguous().view(-1)
    assert x.dtype == y.dtype and x.shape == y.shape, what
    if x.is_floating_point():
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        equal = (x.view(integer) == y.view(integer)) | (x.isnan() & y.isnan())
    else:
        equal = x == y
    wrong = (~equal).nonzero().view(-1)
    assert not len(wrong), (
        f"{what}: {len(wrong)} of {x.numel()} differ, first at {int(wrong[0])}: "
        f"{x[wrong[0]].item()!r}, not {y[wrong[0]].item()!r}"
    )


def stats_on_device(stats: LayerStats) -> LayerStats:
    moved = copy.copy(stats)
    for name in ("minimum", "maximum", "nonfinite", "moments"):
        setattr(moved, name, getattr(stats, name).to(DEVICE))
    return moved
